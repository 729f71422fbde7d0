"""Bundles of nano for benchmarks, exported when they are first asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.machine import ROOT


def exported(
    cache_length: int, recipe: str, export_format: str = "tflite", batch_size: int = 1, options: tuple[str, ...] = ()
) -> Path:
    """Return build/'s nano bundle of this cache length, exporting it if it is not there."""
    batch = f"-batch{batch_size}" if batch_size > 1 else ""
    path = (
        ROOT / "build" / "-".join([f"nano-{export_format}-{recipe}-{cache_length}{batch}", *options]).replace("--", "")
    )
    if not path.exists():
        command = [str(Path(sys.executable).with_name("mtp-export")), "--model", "nano", "--target", export_format]
        command += ["--recipe", recipe, "--cache-length", str(cache_length), "--output", str(path)]
        command += [*(["--batch-size", str(batch_size)] if batch_size > 1 else []), *options]
        subprocess.run(command, check=True)
    return path
