"""The output folder: whole or not there, whatever happens on the way."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_export.bundle.staging import check_output, staged_folder
from mtp_export.errors import OutputError
from tests.support.bundle_folders import MANIFEST, leftover, names, write_bundle


def fail_to_write(output: Path, on_the_way: Callable[[], object] = lambda: None, *, force: bool = False) -> None:
    with staged_folder(output, force=force) as folder:
        (folder / "target.tflite").write_text("half")
        on_the_way()
        raise ValueError("on purpose")


def test_the_output_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "out"
    with staged_folder(output, force=False) as folder:
        (folder / "manifest.json").write_text(MANIFEST)
        assert not output.exists()
    assert names(output) == ["manifest.json"]
    assert names(output.parent) == ["out"]


def test_the_output_has_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", "x")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_failure_leaves_nothing_not_even_the_folders_above(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on purpose"):
        fail_to_write(tmp_path / "a" / "b" / "out")
    assert names(tmp_path) == []


def test_folders_above_that_another_program_uses_by_then_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on purpose"):
        fail_to_write(tmp_path / "a" / "b" / "out", (tmp_path / "a" / "notes").touch)
    assert names(tmp_path / "a") == ["notes"]


def test_force_replaces_a_bundle_even_of_another_version(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", "old")
    write_bundle(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "target.tflite").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_failure_keeps_the_bundle_that_was_to_be_replaced(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="on purpose"):
        fail_to_write(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "target.tflite").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="directory not empty"), staged_folder(tmp_path / "out", force=False):
        write_bundle(tmp_path / "out", "another's")
    assert (tmp_path / "out" / "target.tflite").read_text() == "another's"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("content", ["", "[", "null", "[]", '{"format_version": 1}', "[" * 100_000, "\0"])
def test_what_is_no_manifest_of_ours_protects_its_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(OutputError, match="is not a bundle"):
        check_output(tmp_path / "out", force=True)


def test_a_link_to_nowhere_is_something_that_exists(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match="exists: choose another --output"):
        check_output(tmp_path / "out", force=False)


def test_a_link_to_a_bundle_is_replaced_and_not_followed(tmp_path: Path) -> None:
    write_bundle(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    write_bundle(tmp_path / "out", "new", force=True)
    assert (tmp_path / "real" / "target.tflite").read_text() == "old"
    assert (tmp_path / "out" / "target.tflite").read_text() == "new"
    assert not (tmp_path / "out").is_symlink()


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    leftover(tmp_path)
    write_bundle(tmp_path / "out", "x")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", [".out.partial-backup", ".out.partial-abcd1234.tar", "out.partial-abcd1234"])
def test_what_only_looks_alike_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    write_bundle(tmp_path / "out", "x")
    assert names(tmp_path) == sorted([name, "out"])


def test_what_exports_of_other_outputs_left_stays(tmp_path: Path) -> None:
    leftover(tmp_path, "other")
    for output in ("out", "o*", "[o]ther", "*"):
        write_bundle(tmp_path / output, "x")
    assert ".other.partial-abcd1234" in names(tmp_path)


def test_a_bundle_that_a_killed_export_had_moved_aside_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames of --force: the old bundle is whole, and it is found again."""
    write_bundle(tmp_path / "out", "old")
    (tmp_path / "out").rename(leftover(tmp_path) / "old")
    with pytest.raises(OutputError, match="exists"):
        write_bundle(tmp_path / "out", "new")
    assert (tmp_path / "out" / "target.tflite").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_signal_while_tidying_up_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once more, just when the workspace is being removed: it is removed, and the signal is not lost."""
    remove = os.rmdir

    def interrupted_rmdir(path: str, **place: int) -> None:
        signal.raise_signal(signal.SIGINT)
        remove(path, **place)

    monkeypatch.setattr("os.rmdir", interrupted_rmdir)
    with pytest.raises(KeyboardInterrupt):
        fail_to_write(tmp_path / "out")
    monkeypatch.undo()
    assert names(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_file_system_that_allows_no_large_files(tmp_path: Path) -> None:
    """A limit on the size of a file answers like a file system that has one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OutputError, match="larger files than are allowed there"):
            write_bundle(tmp_path / "out", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == []


def test_an_error_that_is_not_about_the_place_is_not_explained_away(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError), staged_folder(tmp_path / "out", force=False):
        raise ChildProcessError(10, "No child processes")
