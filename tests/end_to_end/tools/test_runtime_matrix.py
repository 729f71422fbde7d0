"""The table of LiteRT-LM's versions: one that fails loses no line of it."""

from __future__ import annotations

from pathlib import Path

from tools.runtime_matrix.contexts import CONTEXTS, Runs


def test_a_version_that_fails_has_an_error_in_each_line(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such thing >&2\nexit 3\n", encoding="utf-8")
    python.chmod(0o755)
    lines = Runs(python=python, without=tmp_path, with_rings=tmp_path, work=tmp_path).lines(["OFF", "ON"])
    assert len(lines) == len(CONTEXTS) + 2
    for by_mode in lines.values():
        assert by_mode == {mode: {"error": "exit 3: no such thing"} for mode in ("OFF", "ON")}


def test_an_error_of_one_mode_leaves_the_others(tmp_path: Path) -> None:
    """Of texts that are taken back, the version answers without drafts alone."""
    python = tmp_path / "python"
    answer = "[[300, 0, 400, [], 0, 20, []], [300, 0, 600, [], 0, 20, []]]"
    python.write_text(f"#!/bin/sh\ngrep -q OFF $3 || exit 4\necho '{answer}' > $4\n", encoding="utf-8")
    python.chmod(0o755)
    lines = Runs(python=python, without=tmp_path, with_rings=tmp_path, work=tmp_path).lines(["OFF", "ON"])
    assert lines["taken back too far"] == {"OFF": ["", ""], "ON": {"error": "exit 4:"}}
