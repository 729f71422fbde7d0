"""What does the clustered head save? Dense heads against ours at the size of E2B's drafter, in both backends, one run.

V = 262144 tokens of D = 256, 2048 clusters of 128, the 32 best: the exported form of each backend (int8 recipe), beside
dense heads: float32, int8 and int4 in ONNX Runtime, float32 and int8 in LiteRT. Random weights: time does not depend
on them. Heads take turns of some runs each: the first of a turn finds its weights out of the caches (cold), the others
as a chain of drafts finds them (warm). Medians in µs.

    python -m benchmarks.head

Goal: ONNX Runtime's clustered head takes at most a sixth of its dense int4 head.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.litert_steps import Step, litert_steps
from benchmarks.machine import write_result
from mtp_export.arch.published import PAIRS
from mtp_export.formats.onnx import convert as lower_onnx
from mtp_export.formats.onnx.write import write_onnx
from mtp_export.formats.tflite import chain as lower_tflite
from mtp_export.formats.tflite.write import write_graph
from mtp_export.graph.builder import GraphBuilder
from mtp_export.graph.ir import TracedGraph
from mtp_export.models.clustered_head import BatchedClusteredHead, ClusteredHead
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.recipes import FLOAT32, INT8, WeightFormat

SPEC = PAIRS["e2b"].drafter
GOAL = 1 / 6
RUNS_A_TURN = 8
INT4_BLOCKS = WeightFormat(bits=4, block_size=32)
INT8_BLOCKS = WeightFormat(bits=8, block_size=32)


class DenseHead(nn.Module):
    """Scores of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(SPEC.hidden_size, SPEC.vocab_size, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": F.linear(x, self.table.weight)}


class TfliteHead(nn.Module):
    """The clustered head as a row of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = ClusteredHead(SPEC.head, SPEC.hidden_size, row_scales=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(x, torch.ones(1, dtype=torch.int32))}


class OnnxHead(nn.Module):
    """The clustered head as candidates."""

    def __init__(self) -> None:
        super().__init__()
        self.head = BatchedClusteredHead(SPEC.head, SPEC.hidden_size, quantised=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        candidates, scores, best = self.head(x)
        return {"candidates": candidates, "scores": scores, "best": best}


def main() -> int:
    """Measure, print and write the result; return 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = build(Path(folder), options.threads)
        cold: dict[str, list[float]] = {name: [] for name in steps}
        warm: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(options.turns + 1):
            for name, step in steps.items():
                for run in range(RUNS_A_TURN):
                    started = time.perf_counter()
                    step()
                    if turn:  # the first turn packs weights
                        (warm if run else cold)[name].append(1e6 * (time.perf_counter() - started))
    rows = {
        name: {
            "warm_us": round(statistics.median(warm[name]), 1),
            "warm_min_us": round(min(warm[name]), 1),
            "cold_us": round(statistics.median(cold[name]), 1),
        }
        for name in steps
    }
    for name, row in rows.items():
        print(f"{name:24} warm {row['warm_us']:8.0f} (least {row['warm_min_us']:6.0f})  cold {row['cold_us']:8.0f}")
    ratio = rows["onnx clustered"]["warm_us"] / rows["onnx dense int4"]["warm_us"]
    print(f"onnx: clustered / dense int4 = {ratio:.3f}, goal {GOAL:.3f}")
    figures = {"threads": options.threads, "vocab_size": SPEC.vocab_size, "hidden_size": SPEC.hidden_size}
    print(f"written: {write_result('head', {**figures, 'onnx_ratio': round(ratio, 4), 'heads': rows})}")
    return int(ratio > GOAL)


def build(folder: Path, threads: int) -> dict[str, Step]:
    """Write and load every head; returns one call of each."""
    dense = trace(DenseHead)
    onnx_heads = {
        "onnx dense f32": (dense, FLOAT32),
        "onnx dense int8": (dense, INT8_BLOCKS),
        "onnx dense int4": (dense, INT4_BLOCKS),
        "onnx clustered": (trace(OnnxHead), FLOAT32),
    }
    tflite_heads = {
        "litert dense f32": (dense, FLOAT32),
        "litert dense int8": (dense, INT8),
        "litert clustered": (trace(TfliteHead), FLOAT32),
    }
    x = np.random.default_rng(0).standard_normal((1, 1, SPEC.hidden_size), np.float32)
    ort.set_global_thread_pool_sizes(threads, 1)
    steps: dict[str, Step] = {}
    for name, (graph, format) in onnx_heads.items():
        (lowered,) = lower_onnx.lower([graph], 1, portable=False)
        path = folder / f"{name.replace(' ', '-')}.onnx"
        write_onnx(lowered, parameters(graph, format), path)
        session_options = ort.SessionOptions()
        session_options.use_per_session_threads = False
        session = ort.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_cpu_input("x", x)
        for output in session.get_outputs():
            shape = tuple(output.shape)
            dtype = np.float32 if output.type == "tensor(float)" else np.int32
            binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), "cpu"))
        steps[name] = partial(session.run_with_iobinding, binding)
    for name, (graph, format) in tflite_heads.items():
        (lowered_tflite,) = lower_tflite.lower([graph], 1)
        path = folder / f"{name.replace(' ', '-')}.tflite"
        write_graph(lowered_tflite, parameters(graph, format), path)
        steps[name] = litert_steps(path, threads, {"head": {"x": x}})["head"]
    return steps


def trace(build_head: Callable[[], nn.Module]) -> TracedGraph:
    """Return a graph of a head alone."""
    builder = GraphBuilder("head")
    builder.start({"x": ((1, 1, SPEC.hidden_size), torch.float32)})
    builder.call("head", build_head, {"x": "x"})
    outputs = {name: name for name in builder.segments["head"].outputs}
    builder.finish("head", "draft", outputs, num_tokens=1)
    return builder.graph()


def parameters(graph: TracedGraph, format: WeightFormat) -> dict[str, Parameter]:
    """Return random weights; those of a clustered head in the form that its graph takes."""
    random = np.random.default_rng(1)
    ordering = random.permutation(SPEC.vocab_size).astype(np.int32).reshape(SPEC.head.num_centroids, -1)

    def rows_of(name: str, shape: tuple[int, ...]) -> Callable[[int, int], Any]:
        def rows(start: int, stop: int) -> Any:
            size = (stop - start, *shape[1:])
            if name == "head.token_ordering":
                return ordering[start:stop]
            if name == "head.table":
                return random.integers(-127, 128, size).astype(np.int8)
            return random.standard_normal(size, np.float32)

        return rows

    return {
        name: Parameter(
            shape=shape,
            format=INT8 if name == "head.table" else format if name == "table.weight" else FLOAT32,
            rows=rows_of(name, shape),
            unit_scale=name == "head.table",
        )
        for name, shape in graph.weights.items()
    }


if __name__ == "__main__":
    sys.exit(main())
