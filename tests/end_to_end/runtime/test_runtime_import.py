"""Importing the runtime is light, and so is asking the program for help."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "tensorflow", "ai_edge_litert", "litert_torch", "litert_lm", "onnxruntime", "transformers"}
HELP = """
import sys
from mtp_export.cli.main import main
sys.argv[1:] = ["--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.parametrize(
    ("code", "heavy"),
    [("import mtp_runtime", HEAVY | {"google", "jinja2"}), (HELP, HEAVY)],
    ids=["mtp_runtime", "mtp-export --help"],
)
def test_no_inference_or_training_library_is_loaded(code: str, heavy: set[str]) -> None:
    """In a process of its own; help texts go to standard output before the list of modules."""
    script = f"{code}\nimport sys\nprint('\\n' + ' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "mtp_runtime" in loaded
    assert not heavy & loaded
