"""The tables of nano's small world, one TOML file a topic."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


def read_table(topic: str) -> dict[str, Any]:
    """Return the tables of a topic, in the order of their file."""
    return tomllib.loads((Path(__file__).parent / f"{topic}.toml").read_text(encoding="utf-8"))
