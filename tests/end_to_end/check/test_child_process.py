"""A module in a process of its own: its result and log, and the errors of a child without a result."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from mtp_export.child_process import ChildFailedError, ChildTimeoutError, run_child

CHILD = """
import sys, time
from pathlib import Path
from typing import Any
from mtp_export.child_process import answer_parent

def handle(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    print("a line of the log", file=sys.stderr)
    if request["do"] == "fail":
        raise ValueError("it failed")
    if request["do"] == "hang":
        time.sleep(600)
    if request["do"] == "leave":
        sys.exit(0)
    return {"folder": str(folder), "path": sys.path}

if __name__ == "__main__":
    answer_parent(dict[str, Any], handle)
"""


class Result(msgspec.Struct):
    folder: str
    path: list[str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module that children find."""
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2] / 'converter'}")
    return "a_child"


def test_a_result_comes_back_with_the_log(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    result, log = run_child(module, {"do": "work"}, Result, timeout_s=60)
    assert log == "a line of the log\n"
    assert not Path(result.folder).exists(), "the child's folder is removed"
    assert not {"", str(here)} & set(result.path), "the current folder is none of the child's imports"


@pytest.mark.parametrize(
    ("deed", "exit_code", "last_line"), [("fail", 1, "ValueError: it failed"), ("leave", 0, "a line of the log")]
)
def test_a_child_without_a_result_failed(module: str, deed: str, exit_code: int, last_line: str) -> None:
    with pytest.raises(ChildFailedError) as caught:
        run_child(module, {"do": deed}, Result, timeout_s=60)
    assert caught.value.exit_code == exit_code
    assert caught.value.log.startswith("a line of the log\n")
    assert caught.value.last_line == last_line


def test_a_child_that_hangs_is_killed(module: str) -> None:
    with pytest.raises(ChildTimeoutError):
        run_child(module, {"do": "hang"}, Result, timeout_s=2)
