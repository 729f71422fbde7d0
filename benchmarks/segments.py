"""What the segments of a LiteRT target take, one kind at a time: LiteRT's wheel has no profiler.

    python -m benchmarks.segments [--model e2b] [--recipe int4] [--tokens 1,4,5,8] [--threads 2] [--filled 500]

Every kind of segment is a graph of its own at true shapes, with copies enough to be out of the caches, and random
weights. Medians of turns times how often a pass calls it give the parts of the pass; `benchmarks.real_size` has what
the whole takes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.litert_steps import Step, litert_steps
from benchmarks.machine import write_result
from benchmarks.matrices import random_rows
from mtp_export.arch import published
from mtp_export.formats.tflite import chain as lower_tflite
from mtp_export.formats.tflite.write import write_graph
from mtp_export.graph.builder import GraphBuilder
from mtp_export.graph.ir import Segment, TracedGraph, TracedSignature
from mtp_export.graph.static import GraphShape, trace_drafter, trace_target
from mtp_export.weights.mapping import target_format
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.recipes import RECIPES, Recipe, WeightFormat
from mtp_runtime.bundle.context import FULL_STEP

MOST_BYTES = 128 << 20  # of the weights of all copies, more than the caches hold
MOST_COPIES = 8


def main() -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(published.PAIRS), default="e2b")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="int4")
    parser.add_argument("--tokens", default="1,4,5,8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--filled", type=int, default=500)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    tokens = [int(n) for n in options.tokens.split(",")]
    read = read_slots(options.filled + max(tokens) - 1)
    passes: dict[str, dict[str, dict[str, float]]] = {}
    for graph, traced in passes_of(options.model, tokens, read):
        counts = Counter(call.segment for call in traced.calls)
        if graph.role == "drafter":
            del counts["head"]  # benchmarks.head has it
        recipe = RECIPES[options.recipe if graph.role == "target" else "int8"]
        micros = segments_us({key: graph.segments[key] for key in counts}, recipe, read, options)
        label = f"{traced.signature.name} of {traced.signature.num_tokens}"
        passes[label] = {key: {"count": count, "us": round(micros[key], 1)} for key, count in counts.items()}
        total = sum(part["count"] * part["us"] for part in passes[label].values())
        print(f"{label}: {total / 1000:.1f} ms")
        for key, part in passes[label].items():
            whole = part["count"] * part["us"]
            print(f"  {key:32} {part['count']:3} x {part['us']:9.1f} us = {whole / 1000:7.2f} ms  {whole / total:5.1%}")
    figures = {name: getattr(options, name) for name in ("model", "recipe", "threads", "filled", "turns")}
    figures["passes"] = passes
    print(f"written: {write_result(f'segments_{options.model}', figures)}")
    return 0


def passes_of(model: str, tokens: Sequence[int], length: int) -> list[tuple[TracedGraph, TracedSignature]]:
    """The target's pass for every number of tokens and the drafter's, over caches as long as what full layers read
    of them."""
    pair = published.PAIRS[model]
    shapes = [GraphShape(cache_length=length, num_draft_tokens=max(n - 1, 1), prefill_lengths=()) for n in tokens]
    graphs = [(trace_target(pair.target, shape), n) for shape, n in zip(shapes, tokens, strict=True)]
    graphs.append((trace_drafter(pair.drafter, pair.target, shapes[0], position_offset=1, row_scales=True), 1))
    return [(graph, traced) for graph, n in graphs for traced in graph.signatures if traced.signature.num_tokens == n]


def read_slots(last: int) -> int:
    """How many slots a pass up to position `last` reads of a full layer's cache: see `positions.filled_slots`."""
    return (last // FULL_STEP + 1) * FULL_STEP


def segments_us(
    segments: Mapping[str, Segment], recipe: Recipe, read: int, options: argparse.Namespace
) -> dict[str, float]:
    """Median microseconds of one call of each segment, among copies with weights of their own; caches are written in
    place."""
    builder = GraphBuilder("segments")
    formats: dict[str, WeightFormat] = {}
    values: dict[str, dict[str, NDArray[Any]]] = {}
    copies: dict[str, int] = {}
    for key, segment in segments.items():
        parameters = {leaf: tuple(weight.shape) for leaf, weight in segment.module.named_parameters()}
        size = 0
        for leaf, shape in parameters.items():
            formats[f"{key}.{leaf}"] = target_format("target", leaf, shape, recipe)
            size += math.prod(shape) * formats[f"{key}.{leaf}"].bits // 8
        copies[key] = min(MOST_COPIES, max(1, MOST_BYTES // max(size, 1)))
        inputs = {
            f"{name}.{copy}": (tuple(tensor.shape), tensor.dtype)
            for copy in range(copies[key])
            for name, tensor in segment.inputs.items()
        }
        builder.start(inputs)
        results: dict[str, str] = {}
        for copy in range(copies[key]):
            bindings = {name: f"{name}.{copy}" for name in segment.inputs}
            renamed = {name: f"{name}.{copy}.out" for name in segment.outputs}
            builder.call(key, partial(getattr, segment, "module"), bindings, renamed, prefix=f"{copy}.{key}.")
            results |= {value: value for value in renamed.values()}
        builder.finish(key, "decode", results, num_tokens=1)
        first = {"input_pos": options.filled, "at": options.filled, "slots": options.filled, "filled": read}
        values[key] = {
            name: value_of(shape, dtype, first.get(name.partition(".")[0], 0))
            for name, (shape, dtype) in inputs.items()
        }
    graph = builder.graph()
    (lowered,) = lower_tflite.lower([graph], 1)
    random = {
        name: Parameter(shape=shape, format=formats[name.partition(".")[2]], rows=partial(random_rows, shape[1:]))
        for name, shape in graph.weights.items()
    }
    in_place = {f"{name}.out": name for bindings in values.values() for name in bindings if "_cache." in name}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "segments.tflite"
        write_graph(lowered, random, path)
        steps = litert_steps(path, options.threads, values, in_place)
        return {key: timed(step, options.turns) / copies[key] for key, step in steps.items()}


def value_of(shape: tuple[int, ...], dtype: torch.dtype, first: int) -> NDArray[Any]:
    """Return what a pass would feed: positions and slots in order, from the first one on, the rest at random."""
    if dtype == torch.int32:
        return np.arange(first, first + shape[0], dtype=np.int32)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def timed(step: Step, turns: int) -> float:
    times = []
    for _ in range(turns + 2):
        started = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - started))
    return statistics.median(times[2:])


if __name__ == "__main__":
    sys.exit(main())
