"""Bundles of nano damaged on purpose, their manifests put right, so that nothing but a measurement can tell."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from mtp_export.bundle.litertlm import write_manifest
from mtp_export.source.checkpoint import hash_file
from mtp_runtime import Manifest, read_manifest

Damage = Callable[[Path], None]


def damaged(bundle: Path, folder: Path, damage: Damage) -> Path:
    """A copy of `bundle` at `folder` with the damage done and every hash right."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("*.litertlm", "*.json.partial"))
    damage(folder)
    manifest = read_manifest(folder)
    files = {role: hash_file(folder / entry.path) for role, entry in manifest.files.items() if role != "litertlm"}
    write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    return folder


def doubled_scales(name: str) -> Damage:
    """Every scale of one of the target's matrices times 2."""

    def damage(folder: Path) -> None:
        def double(tensor: Any, content: NDArray[np.uint8]) -> None:
            tensor.Quantization().ScaleAsNumpy()[:] *= 2

        assert _change(folder / "target.tflite", name, double) > 0

    return damage


def turned_centroids(folder: Path) -> None:
    """Centroid i in the place of i + 1, while the clusters stay."""

    def turn(tensor: Any, content: NDArray[np.uint8]) -> None:
        rows = content.view(np.float32).reshape(tuple(tensor.ShapeAsNumpy()))
        rows[:] = np.roll(rows, 1, axis=0)

    _change(folder / "drafter.tflite", "masked_embedding.centroids.weight", turn, once=True)


def other_position(folder: Path) -> None:
    """A manifest that says the other position convention than its graph has."""
    manifest: Manifest = read_manifest(folder)
    other = 1 - manifest.drafter_position_offset
    write_manifest(folder, msgspec.structs.replace(manifest, drafter_position_offset=other))


def _change(path: Path, name: str, change: Callable[[Any, NDArray[np.uint8]], None], *, once: bool = False) -> int:
    """Apply `change` to the tensors called `name` of every signature, and return how many there are."""
    data = bytearray(path.read_bytes())
    model = schema.Model.GetRootAs(data, 0)
    changed = 0
    for i in range(model.SubgraphsLength()):
        for j in range(model.Subgraphs(i).TensorsLength()):
            tensor = model.Subgraphs(i).Tensors(j)
            if tensor.Name() == name.encode() and not (once and changed):
                buffer = model.Buffers(tensor.Buffer())
                content = np.frombuffer(data, np.uint8)[buffer.Offset() : buffer.Offset() + buffer.Size()]
                change(tensor, content)
                changed += 1
    path.write_bytes(data)
    return changed
