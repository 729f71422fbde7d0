"""The ONNX pair on ONNX Runtime's WebGPU provider: is its output the same, what leaves the GPU, are caches in place?

Target and drafter run on the GPU over one set of caches in its memory, which are bound once. What looks embeddings up
runs on the CPU.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from mtp_runtime import Bundle, GenerationTrace, Session
from mtp_runtime.backends.onnx.backend import OnnxBackend
from mtp_runtime.backends.onnx.errors import REFUSED
from mtp_runtime.backends.onnx.opening import pooled_options
from mtp_runtime.backends.onnx.runs import BoundGraph, TargetRun
from mtp_runtime.backends.onnx.webgpu import DeviceRows, open_session
from mtp_runtime.bundle.contract import BATCH_ROLES, CacheName, output_name
from mtp_runtime.errors import MtpError
from mtp_runtime.generate.stats import overall_acceptance_rate, overall_tokens_per_second
from mtp_runtime.measure.parity import Comparison, compare_tokens
from tools.gpu_check.equality import TOLERANCES
from tools.gpu_check.memory import gpu_memory_mib
from tools.gpu_check.onnx_bundles import NANO_RECIPES, eighth, nano

LENGTHS = (1024, 4096, 16384, 131072)
_FILLED = 500
_WARM_UP, _REPEATS = 5, 40
_COPIES = ("MemcpyToHost", "MemcpyFromHost")
_NOT_RUN: tuple[type[Exception], ...] = (MtpError, *REFUSED)
Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class OnnxCheck:
    """What is run: nano's recipes, and caches of some lengths, timed so many times."""

    max_new_tokens: int
    recipes: Sequence[str] = NANO_RECIPES
    lengths: Sequence[int] = LENGTHS
    repeats: int = _REPEATS


def check_onnx(folder: Path, prompts: Sequence[str], check: OnnxCheck, on_run: Callable[[str], None]) -> dict[str, Any]:
    """Run all of it; bundles are taken from `folder`."""
    # ONNX Runtime offers the provider where it sees a GPU, which a container may hide; Vulkan decides what it runs on.
    os.environ.setdefault("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")
    count = check.max_new_tokens
    figures: dict[str, Any] = {"max_new_tokens": count, "prompts": len(prompts), "equality": []}
    for recipe in check.recipes:
        path = nano(folder, recipe)
        on_run(f"{path.name}: what leaves the GPU")
        figures.setdefault("placement", {})[recipe] = {role: placement(path / f"{role}.onnx") for role in BATCH_ROLES}
        figures["equality"].append(equality(path, prompts, max_new_tokens=count, on_run=on_run))
    figures["in_place"] = in_place(eighth(folder), check.lengths, check.repeats, on_run)
    return figures


def placement(path: Path) -> dict[str, Any]:
    """Return how many nodes of a graph run where, by operator, and what is copied between GPU and CPU in each pass."""
    options = pooled_options(2)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    with tempfile.TemporaryDirectory(prefix="placement-") as place:
        optimized = Path(place) / path.name
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        session = open_session(path, options)
        nodes = onnx.load(optimized, load_external_data=False).graph.node
    counts_of: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        counts_of.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    copied = [(node.op_type, node.input[0]) for node in nodes if node.op_type in _COPIES]
    return {
        "nodes": {provider: dict(counts.most_common()) for provider, counts in counts_of.items()},
        "copies": [{"kind": kind, "value": value} for kind, value in copied],
        "copies_of_caches": sum(CacheName.in_name(value) for _, value in copied),
    }


def equality(
    path: Path, prompts: Sequence[str], *, max_new_tokens: int, on_run: Callable[[str], None]
) -> dict[str, Any]:
    """Run prompts plainly and with drafts on the GPU, and plainly on the CPU; hold the first against the others."""
    before = gpu_memory_mib()
    with Session.open(path, provider="webgpu") as gpu, Session.open(path) as cpu:
        against_plain: list[Comparison] = []
        against_cpu: list[Comparison] = []
        traces: dict[str, list[GenerationTrace]] = {"plain": [], "mtp": []}
        for number, prompt in enumerate(prompts):
            on_run(f"{path.name}: prompt {number + 1} of {len(prompts)}")
            plain, mtp, expected = (
                session.generate(
                    prompt, max_new_tokens=max_new_tokens, num_draft_tokens=drafts, with_margins=True
                ).finish()
                for session, drafts in ((gpu, 0), (gpu, None), (cpu, 0))
            )
            traces["plain"].append(plain)
            traces["mtp"].append(mtp)
            for verdicts, reference, trace in ((against_plain, plain, mtp), (against_cpu, expected, plain)):
                verdicts.append(
                    compare_tokens(
                        prompt,
                        reference.tokens,
                        trace.tokens,
                        margins=reference.margins,
                        tolerance=TOLERANCES["fp32"],
                        max_new_tokens=max_new_tokens,
                    )
                )
        used = gpu_memory_mib() - before
    stats = [trace.stats for trace in traces["mtp"]]
    return {
        "recipe": gpu.manifest.recipe,
        "num_draft_tokens": gpu.manifest.num_draft_tokens,
        "mtp_against_plain": _counts(against_plain),
        "plain_against_cpu": _counts(against_cpu),
        "acceptance_rate": round(overall_acceptance_rate(stats) or 0.0, 3),
        # Without the first prompt, whose passes compile their shaders.
        "tokens_per_second": {name: _speed(runs[1:]) for name, runs in traces.items()},
        "gpu_memory_mib": used,
    }


def _counts(verdicts: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "equal": sum(comparison.verdict == "equal" for comparison in verdicts),
        "near_ties": sum(comparison.verdict == "near_tie" for comparison in verdicts),
        "different": sum(comparison.verdict == "different" for comparison in verdicts),
        "tokens_agreed": sum(comparison.agreed for comparison in verdicts),
        "tokens_compared": sum(comparison.compared for comparison in verdicts),
        "margins": sorted(round(comparison.margin, 4) for comparison in verdicts if comparison.margin is not None),
    }


def _speed(traces: Sequence[GenerationTrace]) -> float | None:
    speed = overall_tokens_per_second([trace.stats for trace in traces])
    return None if speed is None else round(speed, 1)


def in_place(bundle: Bundle, lengths: Sequence[int], repeats: int, on_run: Callable[[str], None]) -> dict[str, Any]:
    """Time the passes with caches of some lengths at one filling, and a decode whose caches go out apart from where
    they came in, which copies them. Rows of figures by kind of pass, in ms by length; `growth_ms` is of
    the least times, from the first length to the last."""
    rows: dict[str, dict[str, Any]] = {}
    refused: dict[int, str] = {}
    for length in lengths:
        on_run(f"{bundle.manifest.model}: caches of {length}")
        manifest = msgspec.structs.replace(bundle.manifest, cache_length=length)
        longer = Bundle(manifest, bundle.path("target").parent, None)
        try:
            with contextlib.closing(OnnxBackend.open(longer, provider="webgpu")) as backend:
                mib = sum(np.prod(value.shape()) * 4 for value in backend.graphs.cache_values[0].values()) / 2**20
                for name, step in _steps(backend, manifest.num_draft_tokens, manifest.hidden_size).items():
                    row = rows.setdefault(name, {"pass": name, "median_ms": {}, "min_ms": {}, "cache_mib": {}})
                    taken = _times(step, repeats)
                    row["median_ms"][length] = round(statistics.median(taken), 3)
                    row["min_ms"][length] = round(min(taken), 3)
                    row["cache_mib"][length] = round(mib, 1)
        except _NOT_RUN as error:  # a GPU may not have buffers of that size: told in the result
            on_run(f"refused: {error}")
            refused[length] = str(error)
    for row in rows.values():
        times = list(row["min_ms"].values())
        row["growth_ms"] = round(times[-1] - times[0], 3)
    return {"filled": _FILLED, "passes": list(rows.values()), "refused": refused}


def _steps(backend: OnnxBackend, num_draft_tokens: int, hidden_size: int) -> dict[str, Step]:
    backend.kv_cache.advance(_FILLED)  # rows of zeros, as the weights make them
    tokens = range(5, 6 + num_draft_tokens)
    activations = np.zeros(hidden_size, np.float32)
    copying = _copying_graph(backend)

    def copy() -> None:
        backend.graphs.prepare(0, 2)
        copying.run()

    return {
        "decode": lambda: backend.verify(tokens[:1]),
        "verify": lambda: backend.verify(tokens),
        "draft": lambda: backend.draft(5, activations),
        "decode, caches copied out": copy,
    }


def _copying_graph(backend: OnnxBackend) -> BoundGraph:
    """A pass over two tokens, as a quantised target decodes, that returns the caches apart from those it was given."""
    graph = TargetRun(backend.graphs.opened, 2, 2, (0,)).graph
    for name, value in backend.graphs.cache_values[0].items():
        graph.binding.bind_ortvalue_output(output_name(name), DeviceRows(tuple(value.shape())).value)
    return graph


def _times(step: Step, repeats: int) -> list[float]:
    taken = []
    for number in range(_WARM_UP + repeats):
        started = time.perf_counter()
        step()
        if number >= _WARM_UP:
            taken.append(1000.0 * (time.perf_counter() - started))
    return taken
