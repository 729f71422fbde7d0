"""Packed weights: one file for each graph and processor, whole or not there, and never another graph's."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtp_runtime import Session
from mtp_runtime.backends.packed_weights import LITERT, ONNX_RUNTIME, Library, PackedWeights
from mtp_runtime.bundle.contract import FileEntry
from mtp_runtime.errors import BackendError
from tests.conftest import Export
from tests.support.bundle_folders import names

GRAPH = FileEntry(path="target.tflite", sha256="ab" * 32, size_bytes=1000)
PROMPT = [2, 70, 71, 72]
FORMATS = ("tflite", "onnx")


def tokens_of(bundle: Path, cache_dir: Path) -> tuple[int, ...]:
    with Session.open(bundle, threads=1, cache_dir=cache_dir) as session:
        return session.generate(PROMPT, max_new_tokens=12).finish().tokens


def large(folder: Path) -> Path:
    """The target's weights."""
    return max(folder.rglob("*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("export_format", FORMATS)
def test_the_second_start_maps_what_the_first_packed(export_format: str, export_nano: Export, tmp_path: Path) -> None:
    bundle = export_nano("int4", export_format=export_format)
    first = tokens_of(bundle, tmp_path)
    packed = names(tmp_path)
    assert large(tmp_path).stat().st_size > 1 << 20
    written, contents = large(tmp_path).stat().st_ino, large(tmp_path).read_bytes()
    assert tokens_of(bundle, tmp_path) == first
    assert names(tmp_path) == packed
    assert (large(tmp_path).stat().st_ino, large(tmp_path).read_bytes()) == (written, contents)
    assert str(large(tmp_path)) in mapped_by_a_session(bundle, tmp_path)


def test_a_graph_that_onnx_runtime_refuses_is_reported(export_nano: Export, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(export_nano("int4", export_format="onnx"), tmp_path / "bundle"))
    graph = bundle / "target.onnx"
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    with pytest.raises(BackendError, match="ONNX Runtime refuses the bundle"):
        Session.open(bundle, threads=1, verify=False, cache_dir=tmp_path)


def test_graphs_with_other_weights_have_other_files(tmp_path: Path) -> None:
    """A fine-tune's graph is the same file."""
    data = [FileEntry(path="target.onnx.data", sha256=sha * 32, size_bytes=10) for sha in ("01", "02")]
    for file in data:
        weights = PackedWeights(tmp_path, ONNX_RUNTIME, GRAPH, file)
        assert weights.path is not None
        weights.path.mkdir()
        weights.keep()
    assert len(names(tmp_path)) == 2


def mapped_by_a_session(bundle: Path, cache_dir: Path) -> str:
    with Session.open(bundle, threads=1, cache_dir=cache_dir):
        return Path("/proc/self/maps").read_text()


def test_bundles_do_not_get_each_other_s_weights(export_nano: Export, tmp_path: Path) -> None:
    alone = [tokens_of(export_nano(recipe), tmp_path / recipe) for recipe in ("int4", "int8")]
    together = [tokens_of(export_nano(recipe), tmp_path / "both") for recipe in ("int4", "int8")]
    assert together == alone


@pytest.mark.parametrize("export_format", FORMATS)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_damaged_file_is_packed_again(export_nano: Export, tmp_path: Path, kept: float, export_format: str) -> None:
    bundle = export_nano("int4", export_format=export_format)
    first = tokens_of(bundle, tmp_path)
    path = large(tmp_path)
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.warns(UserWarning, match="no packed weights") if export_format == "onnx" else contextlib.nullcontext():
        assert tokens_of(bundle, tmp_path) == first
    assert tokens_of(bundle, tmp_path) == first
    assert path.stat().st_size > 1 << 20


@pytest.mark.parametrize("library", [LITERT, ONNX_RUNTIME])
def test_what_is_new_has_its_name_only_when_it_is_kept(library: Library, tmp_path: Path) -> None:
    first, second = (PackedWeights(tmp_path, library, GRAPH) for _ in range(2))
    for weights in (first, second):
        assert weights.path is not None
        pack(weights.path, library)
    assert first.path != second.path, "each process packs its own"
    for weights in (first, second):  # the second finds that there is one
        weights.keep()
        weights.discard()
    assert len(names(tmp_path)) == 1
    again = PackedWeights(tmp_path, library, GRAPH)
    assert again.path == first.path == second.path == tmp_path / names(tmp_path)[0]
    again.discard()
    assert len(names(tmp_path)) == 1
    again.remove()
    assert not names(tmp_path)


def pack(path: Path, library: Library) -> None:
    """A file, or what ONNX Runtime writes: a folder."""
    if library is ONNX_RUNTIME:
        path.mkdir()
        (path / "target.onnx").write_text("packed")
    else:
        path.write_text("packed")


@pytest.mark.parametrize("library", [LITERT, ONNX_RUNTIME])
def test_what_nobody_needs_is_removed(library: Library, tmp_path: Path) -> None:
    living, ended, old, recent = (
        tmp_path / f"{name}{library.suffix}" for name in (f".{os.getpid()}-1", ".4194305-1", "old", "recent")
    )
    for path in (living, ended, old, recent):
        pack(path, library)
    os.utime(old, (0, time.time() - 40 * 86400))
    PackedWeights(tmp_path, LITERT, GRAPH)
    assert names(tmp_path) == sorted([living.name, recent.name])


def test_a_graph_opens_where_nothing_can_be_written(
    export_nano: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk."""
    bundle = export_nano("int4", export_format="onnx")
    first = tokens_of(bundle, tmp_path / "other")
    monkeypatch.setattr(Path, "mkdir", refused_below(tmp_path / "packed"))
    with pytest.warns(UserWarning, match=r"no packed weights of target\.onnx"):
        assert tokens_of(bundle, tmp_path / "packed") == first
    assert not names(tmp_path / "packed")


def refused_below(folder: Path) -> Callable[..., None]:
    """A `Path.mkdir` for which the disk is full within `folder`."""
    make = Path.mkdir

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        if path.parent == folder:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        make(path, *arguments, **options)

    return mkdir


def test_without_room_or_a_place_there_is_no_file(tmp_path: Path) -> None:
    size = shutil.disk_usage(tmp_path).free
    assert PackedWeights(tmp_path, LITERT, FileEntry(path="x", sha256="ab" * 32, size_bytes=size)).path is None
    (tmp_path / "file").write_text("")
    assert PackedWeights(tmp_path / "file", LITERT, GRAPH).path is None


@pytest.mark.parametrize("export_format", FORMATS)
def test_a_session_opens_without_a_place_for_them(export_format: str, export_nano: Export, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bundle = export_nano("int4", export_format=export_format)
    assert tokens_of(bundle, tmp_path / "file") == tokens_of(bundle, tmp_path / "packed")
