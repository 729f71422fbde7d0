"""What a benchmark's result must name: the machine, the versions and the commit; and where results lie."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mtp_export.machine import processor, system, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
QUIET_LOAD = 0.3  # the load average of a machine where nothing else runs
_BUT_RESULTS = f":(exclude){RESULTS}"  # other results do not change what is measured
_PACKAGES = ("ai-edge-litert", "litert-lm-api", "litert-torch", "numpy", "onnxruntime", "torch", "transformers")


def describe() -> dict[str, Any]:
    """Return the machine, the versions and the commit that a measurement was taken with."""
    return {
        "machine": {"cpu": processor(), "cores": os.cpu_count(), "system": system()},
        "versions": versions(_PACKAGES),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", _BUT_RESULTS)),
    }


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write `figures` with the machine's description to results/`name`.json and return the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**describe(), **figures}, indent=1) + "\n", encoding="utf-8")
    return path


def write_if_quiet(name: str | None, figures: dict[str, Any], load: float) -> bool:
    """Write a result, if it has a name, or print that the machine was not quiet; return whether it was. `load` is the
    load average before the measurement."""
    if load > QUIET_LOAD:
        print(f"NOT CLEAN: the load average was {load:.2f} before, expected at most {QUIET_LOAD}; nothing is written")
        return False
    if name:
        print(f"written: {write_result(name, figures)}")
    return True


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the most."""
    return {name: round(f(values), 3) for name, f in (("median", median), ("low", min), ("high", max))}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
