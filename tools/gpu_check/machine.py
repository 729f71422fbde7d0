"""Describe the machine with the GPU for a result."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from benchmarks.machine import describe


def gpu() -> dict[str, str]:
    """Return name, driver and memory of the first GPU by nvidia-smi; of another GPU, the name in MTP_GPU_NAME."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"gpu": os.environ.get("MTP_GPU_NAME", "unknown"), "driver": "unknown"}
    name, driver, memory = (field.strip() for field in done.stdout.splitlines()[0].split(","))
    return {"gpu": name, "driver": driver, "gpu_memory": memory}


def described(commit: str | None) -> dict[str, Any]:
    """Return the benchmarks' description with the GPU. `commit` is for code that was brought without its history."""
    description = describe()
    description["machine"] |= gpu()
    if commit is not None:
        description |= {"commit": commit, "uncommitted_changes": False}
    return description
