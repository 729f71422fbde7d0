"""Two exports of one name at once, and one after another that was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bundle_folders import names, write_bundle

HOLD = """
import sys
from pathlib import Path
from mtp_export.bundle.staging import staged_folder
with staged_folder(Path(sys.argv[1]), force=False) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is exporting to `tmp_path`/out."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_the_workspace_of_a_living_export_stays(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    (theirs,) = names(tmp_path)
    write_bundle(tmp_path / "out", "ours")
    assert names(tmp_path) == sorted([theirs, "out"])
    _, errors = holder.communicate(timeout=60)
    assert "OutputError" in errors, "two cannot both have the name"
    assert (tmp_path / "out" / "target.tflite").read_text() == "ours"
    assert names(tmp_path) == ["out"]


def test_a_killed_process_loses_its_workspace_to_the_next(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert len(names(tmp_path)) == 1
    write_bundle(tmp_path / "out", "x")
    assert names(tmp_path) == ["out"]
