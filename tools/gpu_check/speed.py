"""E2B or E4B at its true shapes with synthetic weights, on the GPU: time of passes, tokens and rounds, and memory.

Passes are timed one by one; tokens and rounds in stock LiteRT-LM, with the clustered head and a dense one. No draft
of random weights is accepted, so a round commits one token. What MTP gains at a given acceptance follows from a round's
time, because a round costs the same whatever is accepted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mtp_export.check.stock_runtime import StockRequest, run_stock
from mtp_runtime import read_manifest
from tools.gpu_check.full_size import VERIFIED, FullSize, write_full_size
from tools.gpu_check.memory import Watched
from tools.gpu_check.passes import time_passes

_PROMPTS = ("def add(a, b):\n    return", "class Stack:\n    def push(self") * 2
_TOKENS, _REPEATS = 64, 3


def check_speed(
    model: str, folder: Path, kinds: Sequence[str], on_run: Callable[[str], None], *, composites: bool = False
) -> Iterator[dict[str, Any]]:
    """Write a pair's graphs unless they are there, and run them with each kind of activations; yield the figures so
    far after each."""
    written = write_full_size(model, folder, composites=composites)
    drafts = read_manifest(written.bundle).num_draft_tokens
    figures: dict[str, Any] = {"model": model, "recipe": "int4", "num_draft_tokens": drafts}
    figures |= {"file_bytes": {path.stem: path.stat().st_size for path in sorted(written.bundle.glob("*.tflite"))}}
    figures["roofline"] = roofline(figures["file_bytes"]["target"])
    target, drafter = (written.bundle / f"{role}.tflite" for role in ("target", "drafter"))
    every = ("decode", *(f"verify_{n}" for n in VERIFIED))
    graphs = {
        "target": (target, ["prefill_1024"]),
        "passes": (written.passes, every),
        "clustered": (drafter, ["draft"]),
        "dense": (written.dense_drafter, ["draft"]),
    }
    figures["load_ms"], figures["passes"], figures["runs"] = {}, {}, []
    for activations in kinds:
        loaded: dict[str, float] = {}
        passes: dict[str, dict[str, float]] = {}
        for name, (path, signatures) in graphs.items():
            on_run(f"{model}: passes of {path.name}, {activations}, {name}")
            loaded[name], times_of = time_passes(path, signatures, activations=activations)
            passes |= {f"draft, {name}" if key == "draft" else key: times for key, times in times_of.items()}
        figures["load_ms"][activations], figures["passes"][activations] = loaded, passes
        figures["runs"] += _runs(written, activations, on_run)
        yield figures


def _runs(written: FullSize, activations: str, on_run: Callable[[str], None]) -> list[dict[str, Any]]:
    """Plain decoding, and rounds with each head, in stock LiteRT-LM; in turns, because runs minutes apart differ by a
    tenth."""
    manifest = read_manifest(written.bundle)
    clustered = written.bundle / manifest.files["litertlm"].path
    files = {"none": clustered, "clustered": clustered, "dense": written.dense}
    rows: dict[str, dict[str, Any]] = {
        drafter: {"activations": activations, "drafter": drafter, "each_ms": [], "load_ms": [], "peak_mib": {}}
        for drafter in files
    }
    for repeat in range(_REPEATS):
        for drafter, path in files.items():
            on_run(f"{manifest.model}: LiteRT-LM, {activations}, drafter {drafter}, {repeat + 1} of {_REPEATS}")
            with Watched() as watched:
                run = run_stock(
                    StockRequest(
                        model_path=str(path),
                        prompts=_PROMPTS,
                        max_new_tokens=_TOKENS,
                        context_length=manifest.context_length,
                        use_mtp=drafter != "none",
                        backend="gpu",
                        activations=activations,
                    )
                )
            # The first output pays for compiling shaders.
            taken = statistics.median(output.decode_ms / output.num_tokens for output in run.outputs[1:])
            row = rows[drafter]
            row["each_ms"].append(round(taken, 2))
            row["load_ms"].append(round(run.load_ms))
            row["peak_mib"] = {name: max(mib, row["peak_mib"].get(name, 0)) for name, mib in watched.mib.items()}
            row |= {"acceptance": run.acceptance_rate, "warnings": run.warnings}
    for drafter, row in rows.items():
        row["token_or_round_ms"] = statistics.median(row["each_ms"])
        if drafter != "none":
            row["gain"] = gains(rows["none"]["token_or_round_ms"], row["token_or_round_ms"], manifest.num_draft_tokens)
    return list(rows.values())


def gains(token_ms: float, round_ms: float, num_draft_tokens: int) -> dict[str, float]:
    """Speed against plain decoding, where each draft is accepted with a probability once those before it were."""
    return {
        str(rate): round(sum(rate**i for i in range(num_draft_tokens + 1)) * token_ms / round_ms, 3)
        for rate in (0.6, 0.8)
    }


def roofline(decode_bytes: int) -> dict[str, float] | None:
    """The least time of a decode, which reads all of the target: at the rate of copies on the GPU, bytes read and
    written. None where torch cannot use the GPU."""
    if not torch.cuda.is_available():
        return None
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target, times = torch.empty_like(source), []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    rate = 2 * source.numel() / statistics.median(times)
    return {
        "gb_per_s": round(rate / 1e9, 1),
        "decode_bytes": decode_bytes,
        "decode_ms": round(1e3 * decode_bytes / rate, 3),
    }
