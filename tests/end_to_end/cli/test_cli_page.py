"""docs/cli.md says what the help texts say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.places import ROOT


def test_the_page_is_made_from_the_help_texts() -> None:
    """In a process of its own: other tests add models, and help texts name the models that there are."""
    command = [sys.executable, "-m", "tools.cli_page"]
    page = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    if page != (ROOT / "docs" / "cli.md").read_bytes():
        pytest.fail("docs/cli.md is stale: run `python -m tools.cli_page > docs/cli.md`")
