"""What one pass of a graph takes on the GPU, signature by signature, in the kernels and over the one set of caches that
LiteRT-LM runs it with. Each graph runs in a process of its own, which then has all of the GPU's memory to itself."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_runtime.bundle.contract import PARAM_TENSOR, param_tensor
from tools.gpu_check.stock_litert import StockGraph, StockSignature

_WARM_UP, _REPEATS, _FILLED = 10, 30, 500


def time_passes(graph: Path, names: Sequence[str], *, activations: str) -> tuple[float, dict[str, dict[str, float]]]:
    """What loading a graph takes, and by signature the median time of a pass, all in ms: with its hidden state read
    back, without which it is not known to be over, and with that and its logits."""
    with tempfile.TemporaryDirectory(prefix="passes-") as place:
        answer = Path(place) / "times.json"  # the library has standard output for itself
        command = [sys.executable, "-m", "tools.gpu_check.passes", str(graph), activations, str(answer), *names]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        load_ms, times = json.loads(answer.read_text(encoding="utf-8"))
    return load_ms, times


def _main(path: Path, activations: str, answer: Path, names: Sequence[str]) -> None:
    started = time.perf_counter()
    graph = StockGraph(path, activations)
    load_ms = round(1000.0 * (time.perf_counter() - started), 1)
    times = {name: _time(graph.signature(name)) for name in names}
    answer.write_text(json.dumps([load_ms, times]), encoding="utf-8")


def _time(signature: StockSignature) -> dict[str, float]:
    signature.write({name: _value(name, signature) for name in signature.inputs})
    hidden = next((name for name in signature.outputs if name.endswith("activations")), signature.outputs[0])
    read = {"pass_ms": [hidden], "with_logits_ms": [hidden, "logits"]}
    times: dict[str, list[float]] = {}
    for kind, names in read.items():
        if not set(names) <= set(signature.outputs):  # prefill has no logits
            continue
        for number in range(_WARM_UP + _REPEATS):
            started = time.perf_counter()
            signature.run()
            for name in names:
                signature.read(name)
            if number >= _WARM_UP:
                times.setdefault(kind, []).append(1000.0 * (time.perf_counter() - started))
    return {kind: round(statistics.median(taken), 3) for kind, taken in times.items()}


def _value(name: str, signature: StockSignature) -> NDArray[Any]:
    """Return what a pass is fed behind so many tokens; hidden states and caches at random."""
    shape, (tokens,) = signature.shapes[name], signature.shapes["input_pos"]
    if name == "input_pos":
        return np.arange(_FILLED, _FILLED + tokens, dtype=np.int32)
    if name == PARAM_TENSOR:
        return param_tensor(_FILLED, _FILLED + tokens)
    if name == "mask":
        seen = np.arange(shape[-1]) <= _FILLED + np.arange(shape[-2])[:, None]
        return np.where(seen, 0.0, -1e4).astype(np.float32)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
