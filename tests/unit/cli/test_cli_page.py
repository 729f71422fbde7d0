"""docs/cli.md holds the help text of every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.cli_page import page

PAGE = Path(__file__).parents[3] / "docs" / "cli.md"


def test_the_page_is_made_from_the_help_texts() -> None:
    if PAGE.read_text(encoding="utf-8") != page():
        pytest.fail("docs/cli.md is stale: run `python -m tools.cli_page > docs/cli.md`")
