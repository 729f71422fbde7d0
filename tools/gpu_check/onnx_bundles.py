"""Bundles for ONNX Runtime on a GPU, which a machine without torch's ONNX exporter can be brought."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import ROOT
from mtp_export.config import FormatConfig
from mtp_runtime import Bundle, read_manifest
from tools.gpu_check.full_size import export_config, exported

NANO_RECIPES = ("f32", "int4")
_EIGHTH, _DEPTH = "e2b-eighth-onnx", "1/8"


def write_onnx_bundles(folder: Path) -> None:
    """Write all of them that are not there."""
    for recipe in NANO_RECIPES:
        nano(folder, recipe)
    _write_eighth(folder / _EIGHTH)


def nano(folder: Path, recipe: str) -> Path:
    """Return a bundle of nano, exported if it is not there."""
    path = folder / f"nano-{recipe}-onnx"
    config = export_config("nano", recipe, "cpu", path, None)
    return exported(dataclasses.replace(config, format=FormatConfig(name="onnx")))


def eighth(folder: Path) -> Bundle:
    """E2B's true widths with an eighth of its layers at int4, written if it is not there.

    The graphs alone are kept: how long a pass takes does not hang on what the weights are, and here they are zeros.
    """
    path = folder / _EIGHTH
    _write_eighth(path)
    manifest = read_manifest(path)
    for role, entry in manifest.files.items():
        if role.endswith("_data") and not (path / entry.path).exists():
            with (path / entry.path).open("wb") as file:
                file.truncate(entry.size_bytes)
    return Bundle(manifest, path, None)


def _write_eighth(path: Path) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="eighth-", dir=path.parent) as place:
        pair, written = Path(place) / "pair", Path(place) / path.name
        synthesize = ["tools.synthesize", "--model", "e2b", "--depth", _DEPTH, "--output", str(pair)]
        export = ["benchmarks.shallow", "export", "--model", "e2b", "--target", "onnx", "--recipe", "int4"]
        export += ["--checkpoint", str(pair / "target"), "--drafter", str(pair / "drafter"), "--output", str(written)]
        for module, *arguments in (synthesize, export):
            subprocess.run([sys.executable, "-m", module, *arguments], check=True, cwd=ROOT, stdout=sys.stderr)
        for role, entry in read_manifest(written).files.items():
            if role.endswith("_data"):
                (written / entry.path).unlink()
        written.rename(path)
