"""A killed export goes on where it was, if what is there is whole and of the same export."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtp_export.bundle.journal import Journal
from mtp_export.bundle.staging import staged_folder
from tests.conftest import Export, run_cli
from tests.support.bundle_folders import leftover, names, write_bundle


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A staged folder with two finished files and a half-written one."""
    folder = tmp_path / "new"
    folder.mkdir()
    journal = Journal(folder, "this")
    for name in ("a", "b"):
        (folder / name).write_text(f"whole {name}")
        journal.add(folder / name)
    (folder / "c").write_text("half")
    (folder / ".parts-x").mkdir()
    return folder


def test_finished_files_are_found_and_half_written_ones_removed(stage: Path) -> None:
    assert Journal(stage, "this").files.keys() == {"a", "b"}
    assert names(stage) == ["a", "b"]


def test_files_of_another_export_do_not_count(stage: Path) -> None:
    assert not Journal(stage, "that").files
    assert names(stage) == []


@pytest.mark.parametrize("content", ["whole", "whole A", "whole b"])
def test_a_file_that_changed_does_not_count(stage: Path, content: str) -> None:
    (stage / "a").write_text(content)
    assert Journal(stage, "this").files.keys() == {"b"}
    assert names(stage) == ["b"]


@pytest.mark.parametrize("content", ["", "{", '{"made_of": "this", "files": {"../a": {}}}'])
def test_a_damaged_journal_does_not_count(stage: Path, content: str) -> None:
    (stage.parent / "journal.json").write_text(content)
    assert not Journal(stage, "this").files


def test_the_leftover_with_most_in_it_is_gone_on_with(tmp_path: Path) -> None:
    small, large = leftover(tmp_path), tmp_path / ".out.partial-zzzz1234"
    (large / "new").mkdir(parents=True)
    (large / "new" / "target.tflite").write_text("more than half")
    with staged_folder(tmp_path / "out", force=False, resume=True) as folder:
        assert (folder / "target.tflite").read_text() == "more than half"
        assert not small.exists()
    assert names(tmp_path) == ["out"]


def test_without_a_leftover_resuming_starts_anew(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", force=False, resume=True) as folder:
        assert names(folder) == []


def test_an_export_without_resume_ignores_leftovers(tmp_path: Path) -> None:
    leftover(tmp_path)
    write_bundle(tmp_path / "out", "x")
    assert names(tmp_path / "out") == ["manifest.json", "target.tflite"]


@pytest.mark.parametrize("export_format", ["tflite", "onnx"])
def test_a_killed_export_is_finished_to_the_same_bytes(export_nano: Export, tmp_path: Path, export_format: str) -> None:
    whole = export_nano("int8", export_format=export_format)  # its segments are kept
    batch = ("--batch-size", "8") if export_format == "onnx" else ()
    arguments = ("--model", "nano", "--target", export_format, "--output", str(tmp_path / "out"), *batch)
    process = subprocess.Popen([str(Path(sys.executable).parent / "mtp-export"), *arguments])
    while not (journals := list(tmp_path.glob(".out.partial-*/journal.json"))):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # The target of a LiteRT pair comes last: it has rows of the embedders in it.
    name = "embedder" if export_format == "tflite" else "target"
    (first,) = (journals[0].parent / "new").glob(f"{name}.{export_format}")
    written = first.stat().st_mtime_ns
    run_cli(*arguments, "--resume")
    assert (tmp_path / "out" / first.name).stat().st_mtime_ns == written
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == names(whole)
    for path in whole.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
