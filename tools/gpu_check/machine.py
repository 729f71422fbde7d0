"""The machine with the GPU, in the words of a result."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from benchmarks.machine import describe


def gpu() -> dict[str, str]:
    """Name, driver and memory of the first GPU, as nvidia-smi tells them; of others, what MTP_GPU_NAME says."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"gpu": os.environ.get("MTP_GPU_NAME", "unknown"), "driver": "unknown"}
    name, driver, memory = (field.strip() for field in done.stdout.splitlines()[0].split(","))
    return {"gpu": name, "driver": driver, "gpu_memory": memory}


def described(commit: str | None) -> dict[str, Any]:
    """What benchmarks.machine says, with the GPU. `commit` is for code that was brought without its history."""
    found = describe()
    found["machine"] |= gpu()
    if commit is not None:
        found |= {"commit": commit, "uncommitted_changes": False}
    return found
