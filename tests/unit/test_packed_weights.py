"""Packed weights: one file for each graph and processor, whole or not there, and never another graph's."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from mtp_runtime import Session
from mtp_runtime.contract import FileEntry
from mtp_runtime.errors import BackendError
from mtp_runtime.packed_weights import LITERT, ONNX_RUNTIME, PackedWeights
from tests.conftest import Export
from tests.unit.test_staging import names

GRAPH = FileEntry(path="target.tflite", sha256="ab" * 32, size_bytes=1000)
PROMPT = [2, 70, 71, 72]
FORMATS = ("tflite", "onnx")


def said(bundle: Path, cache_dir: Path) -> tuple[int, ...]:
    with Session.open(bundle, threads=1, cache_dir=cache_dir) as session:
        return session.generate(PROMPT, max_new_tokens=12).finish().tokens


def large(folder: Path) -> Path:
    """The target's weights."""
    return max(folder.rglob("*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("export_format", FORMATS)
def test_the_second_start_maps_what_the_first_packed(export_format: str, export_nano: Export, tmp_path: Path) -> None:
    bundle = export_nano("int4", export_format=export_format)
    first = said(bundle, tmp_path)
    packed = names(tmp_path)
    assert large(tmp_path).stat().st_size > 1 << 20
    written, contents = large(tmp_path).stat().st_ino, large(tmp_path).read_bytes()
    assert said(bundle, tmp_path) == first
    assert names(tmp_path) == packed
    assert (large(tmp_path).stat().st_ino, large(tmp_path).read_bytes()) == (written, contents)
    assert str(large(tmp_path)) in mapped_by_a_session(bundle, tmp_path)


def test_onnx_runtime_says_the_same_without_packed_weights(export_nano: Export, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bundle = export_nano("int4", export_format="onnx")
    assert said(bundle, tmp_path / "file") == said(bundle, tmp_path / "packed")


def test_what_onnx_runtime_refuses_is_told(export_nano: Export, tmp_path: Path) -> None:
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
    alone = [said(export_nano(recipe), tmp_path / recipe) for recipe in ("int4", "int8")]
    together = [said(export_nano(recipe), tmp_path / "both") for recipe in ("int4", "int8")]
    assert together == alone


@pytest.mark.parametrize("export_format", FORMATS)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_damaged_file_is_packed_again(export_nano: Export, tmp_path: Path, kept: float, export_format: str) -> None:
    bundle = export_nano("int4", export_format=export_format)
    first = said(bundle, tmp_path)
    path = large(tmp_path)
    os.truncate(path, int(path.stat().st_size * kept))
    assert said(bundle, tmp_path) == first
    assert said(bundle, tmp_path) == first
    assert path.stat().st_size > 1 << 20


def test_a_new_file_has_its_name_only_when_it_is_kept(tmp_path: Path) -> None:
    weights = PackedWeights(tmp_path, LITERT, GRAPH)
    assert weights.path is not None
    weights.path.write_text("packed")
    assert PackedWeights(tmp_path, LITERT, GRAPH).path != weights.path, "another process packs its own"
    weights.keep()
    weights.discard()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["packed"]
    again = PackedWeights(tmp_path, LITERT, GRAPH)
    assert again.path == tmp_path / names(tmp_path)[0]
    again.discard()
    assert len(names(tmp_path)) == 1


def test_what_nobody_needs_is_removed(tmp_path: Path) -> None:
    living, ended, old, recent = (
        tmp_path / f"{name}.xnnpack_cache" for name in (f".{os.getpid()}-1", ".4194305-1", "old", "recent")
    )
    for path in (living, ended, old, recent):
        path.write_text("x")
    os.utime(old, (0, time.time() - 40 * 86400))
    PackedWeights(tmp_path, LITERT, GRAPH)
    assert names(tmp_path) == sorted([living.name, recent.name])


def test_without_room_or_a_place_there_is_no_file(tmp_path: Path) -> None:
    size = shutil.disk_usage(tmp_path).free
    assert PackedWeights(tmp_path, LITERT, FileEntry(path="x", sha256="ab" * 32, size_bytes=size)).path is None
    (tmp_path / "file").write_text("")
    assert PackedWeights(tmp_path / "file", LITERT, GRAPH).path is None


def test_a_session_opens_without_a_place_for_them(export_nano: Export, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert said(export_nano("int4"), tmp_path / "file") == said(export_nano("int4"), tmp_path / "packed")
