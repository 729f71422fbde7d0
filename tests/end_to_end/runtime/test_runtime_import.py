"""Importing the runtime is light."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "tensorflow", "ai_edge_litert", "litert_torch", "litert_lm", "google", "jinja2", "transformers")


def test_importing_the_runtime_loads_no_inference_or_training_library() -> None:
    code = "import sys, mtp_runtime; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mtp_runtime" in found.stdout.split()
    assert not set(HEAVY) & set(found.stdout.split())
    assert found.stderr == ""
