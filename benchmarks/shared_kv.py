"""Does a step cost more because the cache is longer? It must not: the cache is written in place and never copied.

Two bundles of one model, for contexts of 1024 and of 4096 tokens, are filled with the same tokens; decode, verify and
draft passes are timed, alternating between the two in one run. For contrast, the decode of both is timed once more
with separate output buffers for the caches, as a runtime that does not bind in place would run it.

    python -m benchmarks.shared_kv [SHORT_BUNDLE LONG_BUNDLE]
    python -m benchmarks.shared_kv --onnx

Without bundles, nano is exported into build/. Goal: each ratio at most 1.3. An ONNX graph takes a cache of any length,
so with --onnx one bundle is opened with 1024 and with 16384 positions; there the goal is 1.15.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, HardwareAccelerator, Options

from benchmarks.bundles import exported
from benchmarks.machine import write_result
from mtp_runtime import Bundle, Manifest, Session
from mtp_runtime.backends.litert.quiet import native_log_held_back
from mtp_runtime.backends.onnx.backend import OnnxBackend
from mtp_runtime.backends.onnx.runs import BoundGraph, TargetRun

GOAL = 1.3
Step = Callable[[], None]


def main() -> int:
    """Measure, print and write the result; return 1 if a ratio misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path, help="two folders, the shorter cache first")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--filled", type=int, nargs="+", default=[500, 900], help="tokens in the cache")
    parser.add_argument("--recipe", default="int8", help="of the bundles exported where none are given")
    parser.add_argument("--onnx", action="store_true", help="the ONNX pair, with 1024 and 16384 positions")
    options = parser.parse_args()
    if options.onnx:
        return measure_onnx(options)
    paths = options.bundles or [
        exported(length, options.recipe, options=("--default-context", str(length))) for length in (1024, 4096)
    ]
    if len(paths) != 2:
        parser.error("give two bundles, or none")
    with contextlib.ExitStack() as opened:
        pair = [opened.enter_context(Session.open(path, threads=options.threads)) for path in paths]
        rows = [row for filled in options.filled for row in measure_filled(pair, filled, options)]
        manifests = [session.manifest for session in pair]
    figures = {
        "model": f"{manifests[0].model}, {manifests[0].recipe}",
        "threads": options.threads,
        "cache_lengths": [manifest.cache_length for manifest in manifests],
        "goal_ratio": GOAL,
        "steps": rows,
    }
    print(f"{figures['model']}, {options.threads} threads; cache lengths {figures['cache_lengths']}; medians in µs")
    print_rows(rows)
    print(f"written to {write_result('shared_kv', figures)}")
    return int(any(row["ratio"] > GOAL for row in rows if row["in_place"]))


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        short_us, long_us = row["median_us"]
        print(f"{row['filled']:5} filled  {row['step']:26} {short_us:8.0f} {long_us:8.0f}   x {row['ratio']:.2f}")


def measure_filled(pair: Sequence[Session], filled: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fill both caches with the same tokens and time every step at that length, in place and copying."""
    for session in pair:
        session.generate([2] + [3 + at % 50 for at in range(filled - 1)], max_new_tokens=1).finish()
    in_place = [bound_steps(session, filled) for session in pair]
    rows = [
        {"filled": filled, "in_place": True, **measure(name, [steps[name] for steps in in_place], options.repeats)}
        for name in in_place[0]
    ]
    for kind in ("decode", "verify"):
        steps = [copying_step(session, kind, filled, options.threads) for session in pair]
        row = measure(f"{kind}, caches copied out", steps, options.repeats)
        rows.append({"filled": filled, "in_place": False, **row})
    return rows


def bound_steps(session: Session, filled: int) -> dict[str, Step]:
    """Return one step of each kind as the loop runs it at position `filled`, inputs and outputs copied and all."""
    backend = session.backend
    tokens = range(5, 6 + session.manifest.num_draft_tokens)
    activations = np.zeros(session.manifest.hidden_size, np.float32)
    backend.kv_cache.rewind(filled)
    return {
        "decode": lambda: void(backend.verify(tokens[:1])),
        "verify": lambda: void(backend.verify(tokens)),
        "draft": lambda: void(backend.draft(5, activations)),
    }


def void(result: object) -> None:
    """Drop what a pass returned."""


def copying_step(session: Session, kind: str, filled: int, threads: int) -> Step:
    """Return the same pass on buffers of its own, as long as they can be, with each cache's output apart from its
    input."""
    spec = next(spec for spec in session.manifest.signatures["target"] if spec.kind == kind)
    options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=CpuOptions(num_threads=threads))
    with native_log_held_back():
        model = CompiledModel.from_file(str(session.bundle.path("target")), options=options)
        index = model.get_signature_index(spec.name)
        order = model.get_signature_by_index(index)
        inputs = [model.create_input_buffer_by_name(spec.name, name) for name in order["inputs"]]
        outputs = [model.create_output_buffer_by_name(spec.name, name) for name in order["outputs"]]
        for name, buffer in zip(order["inputs"], inputs, strict=True):
            tensor = next(tensor for tensor in spec.inputs if tensor.name == name)
            value = filled if name == "input_pos" else 0
            buffer.write(np.full(tensor.fixed_shape, value, np.dtype(tensor.dtype)))
    return lambda: model.run_by_index(index, inputs, outputs)


def measure_onnx(options: argparse.Namespace) -> int:
    """Measure the same for the ONNX pair: one bundle, two lengths of cache."""
    lengths = (1024, 16384)
    with Bundle.open(exported(1024, options.recipe, "onnx")) as bundle, contextlib.ExitStack() as opened:
        backends = []
        for length in lengths:
            manifest = msgspec.structs.replace(bundle.manifest, cache_length=length)
            longer = Bundle(manifest, bundle.path("target").parent, None)
            backends.append(OnnxBackend.open(longer, threads=options.threads))
            opened.callback(backends[-1].close)
        rows = []
        for filled in options.filled:
            steps = [onnx_steps(backend, bundle.manifest, filled) for backend in backends]
            for name in steps[0]:
                row = measure(name, [kinds[name] for kinds in steps], options.repeats)
                rows.append({"filled": filled, "in_place": "copied" not in name, **row})
        model = f"{bundle.manifest.model}, {bundle.manifest.recipe}, onnx"
    print(f"{model}, {options.threads} threads; cache lengths {lengths}; medians in µs")
    print_rows(rows)
    figures = {"model": model, "threads": options.threads, "cache_lengths": lengths, "goal_ratio": 1.15, "steps": rows}
    print(f"written to {write_result('shared_kv_onnx', figures)}")
    return int(any(row["ratio"] > 1.15 for row in rows if row["in_place"]))


def onnx_steps(backend: OnnxBackend, manifest: Manifest, filled: int) -> dict[str, Step]:
    """One step of each kind at `filled`, and a decode whose caches go to buffers of their own."""
    backend.kv_cache.rewind(0)
    backend.prefill([2] + [3 + at % 50 for at in range(filled - 1)])
    tokens = range(5, 6 + manifest.num_draft_tokens)
    activations = np.zeros(manifest.hidden_size, np.float32)
    copying = copying_graph(backend)

    def copy() -> None:
        backend.graphs.prepare(0, 1)
        copying.run()

    return {
        "decode": lambda: void(backend.verify(tokens[:1])),
        "verify": lambda: void(backend.verify(tokens)),
        "draft": lambda: void(backend.draft(5, activations)),
        "decode, caches copied out": copy,
    }


def copying_graph(backend: OnnxBackend) -> BoundGraph:
    """Return a decode that returns the caches apart from those it was given."""
    graph = TargetRun(backend.graphs.opened, 1, 1, (0,)).graph
    for name, value in backend.graphs.cache_values[0].items():
        apart = ort.OrtValue.ortvalue_from_numpy(np.zeros(value.shape(), np.float32), "cpu")
        graph.binding.bind_ortvalue_output(f"{name}_next", apart)
    return graph


def measure(name: str, pair: Sequence[Step], repeats: int) -> dict[str, Any]:
    """Time both steps of `pair`, alternating; return medians and minima in µs and the ratio of the medians."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 10):
        for step, into in zip(pair, times, strict=True):
            started = time.perf_counter()
            step()
            elapsed_us = 1e6 * (time.perf_counter() - started)
            if repeat >= 10:
                into.append(elapsed_us)
    medians = [round(statistics.median(taken), 1) for taken in times]
    return {
        "step": name,
        "median_us": medians,
        "min_us": [round(min(taken), 1) for taken in times],
        "ratio": round(medians[1] / medians[0], 3),
    }


if __name__ == "__main__":
    sys.exit(main())
