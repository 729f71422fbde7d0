"""Measure E2B's matrices one at a time: the fastest weight format of each, and the number of tokens that stays cheap.

    python -m benchmarks.matrices [--threads 2]

Enough copies of a matrix to be out of the caches, as in a model; times are medians of turns, as multiples of what int4
by row takes for one token. "fused" is one product in place of two or three of the same input. From the sum over all
matrices of the target follows what K drafts gain at an acceptance of 0.8 with each weight format, without the drafter.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.litert_steps import Step, litert_steps
from benchmarks.machine import write_result
from mtp_export.formats.onnx import convert as lower_onnx
from mtp_export.formats.onnx.write import write_onnx
from mtp_export.formats.tflite import chain as lower_tflite
from mtp_export.formats.tflite.write import write_graph
from mtp_export.graph.builder import GraphBuilder
from mtp_export.graph.ir import TracedGraph
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.recipes import INT4, INT8, WeightFormat
from mtp_runtime.backends.onnx.opening import open_graph
from mtp_runtime.measure.timing import expected_committed

TOKENS = (1, 2, 3, 4, 5, 6, 8)
ALPHA = 0.8
BYTES = 64 << 20  # of int4, more than the caches hold
HIDDEN, WIDE, QUERY, KEY, VOCAB = 1536, 12288, 2048, 256, 262144
# Input width, output widths, and how many of them E2B's target has: 20 of 35 layers are wide, the others half as wide.
CASES = {
    "gate, up": (HIDDEN, (WIDE, WIDE), 20 + 15 / 2),
    "down": (WIDE, (HIDDEN,), 20 + 15 / 2),
    "q, k, v": (HIDDEN, (QUERY, KEY, KEY), 15),
    "o": (QUERY, (HIDDEN,), 35),
    "head": (HIDDEN, (VOCAB,), 1),
}
FORMATS = {
    "LiteRT int4": ("tflite", INT4),
    "LiteRT int4 blocks of 32": ("tflite", WeightFormat(bits=4, block_size=32)),
    "LiteRT int8": ("tflite", INT8),
    "ONNX int4 blocks of 32": ("onnx", WeightFormat(bits=4, block_size=32)),
    "ONNX int8 blocks of 32": ("onnx", WeightFormat(bits=8, block_size=32)),
}
FUSED = ", fused"


class Products(nn.Module):
    """The products of one input with matrices of these output widths."""

    def __init__(self, width: int, outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, n, bias=False) for n in outputs)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"y{i}": linear(x) for i, linear in enumerate(self.linears)}


def main() -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    table: dict[str, dict[str, dict[str, float]]] = {}
    for case, (width, outputs, _) in CASES.items():
        copies = max(1, BYTES // (width * sum(outputs) // 2))
        table[case] = {}
        for runtime in ("tflite", "onnx"):
            cuts = {"": outputs}
            if runtime == "tflite" and len(outputs) > 1:
                cuts[FUSED] = (sum(outputs),)
            with tempfile.TemporaryDirectory() as folder:
                steps = {
                    f"{name}{label}": steps_of(width, cut, copies, name, Path(folder), options.threads)
                    for name, (target, _) in FORMATS.items()
                    if target == runtime
                    for label, cut in cuts.items()
                }
                # One runtime at a time: the threads of ONNX Runtime spin for a while after a run.
                table[case] |= timed(steps, options.turns, copies)
        least = table[case]["LiteRT int4"]["1"]
        for name, row in table[case].items():
            print(f"{case:10} {name:31}", *(f"{row[str(m)] / least:6.2f}" for m in TOKENS), f"  (1 is {least:.0f} us)")
    whole = {name: {str(m): total(table, name, m) for m in TOKENS} for name in FORMATS}
    for name, row in whole.items():
        gains = {m - 1: expected_committed(ALPHA, m - 1) * row["1"] / row[str(m)] for m in TOKENS[1:]}
        ratios = " ".join(f"{row[str(m)] / row['1']:.2f}" for m in TOKENS)
        best = max(gains, key=lambda k: gains[k])
        print(f"{name:26} {row['1'] / 1000:6.1f} ms a token; by tokens {ratios}; best K = {best}: {gains[best]:.2f}")
    print(f"written: {write_result('matrices', {'threads': options.threads, 'us': table, 'target_us': whole})}")
    return 0


def total(table: dict[str, dict[str, dict[str, float]]], name: str, tokens: int) -> float:
    """Microseconds of all matrices of the target in CASES, none of them fused."""
    return round(sum(count * table[case][name][str(tokens)] for case, (_, _, count) in CASES.items()), 1)


def trace(width: int, outputs: tuple[int, ...], copies: int, tokens: Iterable[int]) -> TracedGraph:
    """Return the products for numbers of tokens, as signatures that share their weights."""
    builder = GraphBuilder("products")
    for count in tokens:
        builder.start({"x": ((1, count, width), torch.float32)})
        results: dict[str, str] = {}
        for copy in range(copies):
            named = {f"y{i}": f"copy_{copy}_y{i}" for i in range(len(outputs))}
            key = f"products_{count}"  # one segment, converted once, with the weights of each copy in turn
            builder.call(key, partial(Products, width, outputs), {"x": "x"}, named, prefix=f"{copy}.")
            results |= {value: value for value in named.values()}
        builder.finish(f"m{count}", "decode", results, num_tokens=count)
    return builder.graph()


def steps_of(
    width: int, outputs: tuple[int, ...], copies: int, name: str, folder: Path, threads: int
) -> dict[int, Step]:
    """One call for every number of tokens."""
    target, format = FORMATS[name]
    x = {m: np.random.default_rng(m).standard_normal((1, m, width), np.float32) for m in TOKENS}
    if target == "tflite":
        graph = trace(width, outputs, copies, TOKENS)
        (lowered,) = lower_tflite.lower([graph], 1)
        path = folder / f"{format.bits}-{format.block_size}-{len(outputs)}.tflite"
        write_graph(lowered, parameters(graph, format), path)
        steps = litert_steps(path, threads, {f"m{count}": {"x": values} for count, values in x.items()})
        return {count: steps[f"m{count}"] for count in x}
    sessions: dict[int, Step] = {}
    for m in TOKENS:
        graph = trace(width, outputs, copies, (m,))
        (lowered_onnx,) = lower_onnx.lower([graph], 1, portable=False)
        path = folder / f"{format.bits}-{format.block_size}-{m}.onnx"
        write_onnx(lowered_onnx, parameters(graph, format), path)
        sessions[m] = partial(open_graph(path, threads).run, None, {"x": x[m]})
    return sessions


def parameters(graph: TracedGraph, format: WeightFormat) -> dict[str, Parameter]:
    """Weights that are the same ones again and again: time does not depend on them."""
    return {
        name: Parameter(shape=shape, format=format, rows=partial(random_rows, shape[1:]))
        for name, shape in graph.weights.items()
    }


def random_rows(rest: tuple[int, ...], start: int, stop: int) -> NDArray[np.float32]:
    """Return rows of one random block. Shapes: -> [stop - start, *rest]"""
    return np.resize(_random_block(), (stop - start, *rest))


@functools.cache
def _random_block() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(1 << 20, np.float32)


def timed(steps: dict[str, dict[int, Step]], turns: int, copies: int) -> dict[str, dict[str, float]]:
    """Return the median microseconds of a copy, by weight format and number of tokens. The first turn packs."""
    times: dict[str, dict[int, list[float]]] = {name: {m: [] for m in TOKENS} for name in steps}
    for _ in range(turns + 1):
        for name, by_tokens in steps.items():
            for m, step in by_tokens.items():
                started = time.perf_counter()
                step()
                times[name][m].append(1e6 * (time.perf_counter() - started) / copies)
    return {
        name: {str(m): round(statistics.median(taken[1:]), 1) for m, taken in by_tokens.items()}
        for name, by_tokens in times.items()
    }


if __name__ == "__main__":
    sys.exit(main())
