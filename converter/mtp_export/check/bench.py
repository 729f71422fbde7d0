"""The measurements of `mtp-export bench`: passes, the head by itself, whole rounds, and where drafts begin to pay."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from mtp_export.check.head_alone import head_alone
from mtp_export.machine import processor, usable_cores
from mtp_runtime import Session
from mtp_runtime.errors import UserError
from mtp_runtime.measure.profile import Profile
from mtp_runtime.measure.timing import Timing, break_even, filled_prompt, round_ms, time_passes, time_rounds

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_BACKENDS = {"tflite": ("LiteRT", "ai-edge-litert"), "onnx": ("ONNX Runtime", "onnxruntime")}


class BenchReport(Profile, frozen=True, kw_only=True):
    """What one bundle took on one machine. `filled` positions of the cache are read by every pass."""

    filled: int
    open_s: float

    @property
    def num_draft_tokens(self) -> int:
        return max(self.break_even)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """The bundle, a context of `context_length` tokens, None for its own, and how often what is timed: `filled`
    positions are read by every pass, rounds generate `new_tokens` at a time."""

    bundle: Path
    threads: int
    filled: int
    new_tokens: int
    repeats: int
    context_length: int | None = None


def bench(request: BenchRequest, on_run: Callable[[str], None] = lambda name: None) -> BenchReport:
    """Measure a bundle; passes and rounds take turns, so that a machine that slows down slows all alike.

    Raises:
        MtpError: the bundle fails, or has no room for so many tokens.
    """
    on_run("opening")
    started = time.perf_counter()
    threads, filled, new_tokens = request.threads, request.filled, request.new_tokens
    with Session.open(request.bundle, threads=threads, verify=False, context_length=request.context_length) as session:
        open_s = time.perf_counter() - started
        manifest = session.manifest
        if filled + max(new_tokens, manifest.num_draft_tokens + 1) > manifest.context_length:
            remedy = " or a larger --context-length" if manifest.chooses_context else ""
            raise UserError(
                f"--filled {filled} and --new-tokens {new_tokens} are more than the context's "
                f"{manifest.context_length} tokens: give smaller ones{remedy}"
            )
        prompt, k = filled_prompt(session, filled), manifest.num_draft_tokens
        on_run("passes")
        passes = time_passes(session, prompt, request.repeats)
        on_run("head")
        passes["head"] = _time_head(session, threads, request.repeats)
        done = iter(range(1, 2 * (len(ALPHAS) + 1) + 1))
        rounds = time_rounds(
            session, prompt, new_tokens, ALPHAS, on_run=lambda: on_run(f"rounds, {next(done)} of {2 * len(ALPHAS) + 2}")
        )
    medians = {name: timing.median_ms for name, timing in passes.items()}
    name, package = _BACKENDS[manifest.export_format]
    return BenchReport(
        **BenchReport.identity(request.bundle, manifest),
        backend=f"{name} {version(package)}",
        machine=f"{processor()}, {usable_cores()} processors",
        threads=threads,
        filled=filled,
        open_s=round(open_s, 3),
        passes=passes,
        rounds=rounds,
        break_even={d: break_even(medians["decode"], round_ms(medians, d), d) for d in range(1, k + 1)},
    )


def _time_head(session: Session, threads: int, repeats: int) -> Timing:
    times = []
    with head_alone(session.bundle, threads=threads) as run:
        for _ in range(2 + 4 * repeats):
            started = time.perf_counter()
            run()
            times.append(1000.0 * (time.perf_counter() - started))
    return Timing.of(times[2:], 1)
