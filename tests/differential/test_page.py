"""docs/checkpoints.md is what the code says."""

from __future__ import annotations

from pathlib import Path

from tests.differential.__main__ import page


def test_the_page_is_made_from_the_code() -> None:
    """Else: python -m tests.differential > docs/checkpoints.md"""
    assert (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8") == page()
