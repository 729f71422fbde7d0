"""Scripts of sessions in stock LiteRT-LM, in a process of their own: a crash of it ends a test, not all of them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import TESTS

PROGRAM = "tools.runtime_matrix.scripts"
TIMEOUT_S = 1200.0
Script = list[list[Any]]
_numbers = itertools.count()


def run_scripts(
    folder: Path, bundle: Path, scripts: Sequence[Script], *, context: int | None, drafts: bool
) -> list[list[Any]]:
    """Return the results of each script, as the program has them."""
    request_path = folder / f"request-{next(_numbers)}.json"
    answer = request_path.with_suffix(".answer")
    mode = "ON" if drafts else "OFF"
    request = {"bundle": str(bundle), "context": context, "mode": mode, "scripts": list(scripts)}
    request_path.write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-m", PROGRAM, str(request_path), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-500:]
    results: list[list[Any]] = json.loads(answer.read_text(encoding="utf-8"))
    return results


def answers(script: Script, results: list[Any]) -> list[str]:
    """Return the texts of a script's answers, all of them there."""
    assert not isinstance(results[-1], dict), results[-1]
    assert len(results) == len(script)
    return ["".join(result) for (kind, *_), result in zip(script, results, strict=True) if kind == "answer"]
