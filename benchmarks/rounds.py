"""What a pass and a round of a bundle take, and what MTP would gain at an imposed acceptance; as JSON.

    python -m benchmarks.rounds BUNDLE [--threads 2] [--filled 500] [--new-tokens 48]

Acceptance is a property of weights and text, and synthetic weights have none. So drafts are imposed: the drafter runs
and costs what it costs, and its word is replaced by the target's own next one with a chance of alpha, by a wrong one
otherwise. Plain decoding and rounds of every alpha take turns in one run, and must say the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtp_export.proof import TOLERANCES
from mtp_runtime import Session
from mtp_runtime.backend import Draft, FloatArray
from mtp_runtime.parity import compare_tokens

ALPHAS = (0.6, 0.8)


def main() -> int:
    """Measure and print; return 1 if drafts changed what is said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--filled", type=int, default=500, help="positions that are filled before passes are timed")
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    started = time.perf_counter()
    with Session.open(options.bundle, threads=options.threads, verify=False) as session:
        figures: dict[str, Any] = {"open_s": round(time.perf_counter() - started, 2), "threads": options.threads}
        prompt = [session.manifest.bos_token_id, *range(100, 100 + options.filled - 1)]
        started = time.perf_counter()
        session.generate(prompt, max_new_tokens=8, stop_token_ids=()).finish()
        figures["first_answer_s"] = round(time.perf_counter() - started, 2)
        figures |= {"memory_bytes": memory(), "passes_ms": passes(session, prompt)}
        figures |= rounds(session, prompt, options.new_tokens)
    print(json.dumps(figures))
    return 0 if figures["same_output"] else 1


def memory() -> dict[str, int]:
    """What this process has in memory: without a file behind it, and mapped from files."""
    status = Path("/proc/self/status").read_text()
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("Rss")}
    return {"anonymous": sizes["RssAnon"], "mapped": sizes["RssFile"]}


def passes(session: Session, prompt: Sequence[int]) -> dict[str, float]:
    """Median milliseconds of prefill, decode, verify of K + 1 tokens and one draft at the prompt's end."""
    backend, k = session.backend, session.manifest.num_draft_tokens
    activations = np.zeros(session.manifest.hidden_size, np.float32)
    backend.kv_cache.rewind(0)
    started = time.perf_counter()
    backend.prefill(prompt)
    taken = {f"prefill_{len(prompt)}": 1000.0 * (time.perf_counter() - started)}
    steps: dict[str, Callable[[], object]] = {
        "decode": lambda: backend.verify(prompt[:1]),
        f"verify_{k + 1}": lambda: backend.verify(prompt[: k + 1]),
        "draft": lambda: backend.draft(5, activations),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(12):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(1000.0 * (time.perf_counter() - started))
    return {
        name: round(ms, 3)
        for name, ms in (taken | {name: statistics.median(ms[2:]) for name, ms in times.items()}).items()
    }


def rounds(session: Session, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """Committed tokens per second, plainly and at every alpha, in turn.

    Passes of one token and of several may part at a near-tie, so what is imposed is what the target says in rounds.
    """
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "stop_token_ids": ()}
    plain = session.generate(prompt, num_draft_tokens=0, with_margins=True, **options).finish()
    drafted = session.generate(prompt, **options).finish()
    seconds = dict.fromkeys((0.0, *ALPHAS), 0.0)
    per_round: dict[float, float] = {}
    whatever_drafts = True
    for _ in range(2):
        for alpha in seconds:
            with imposed(session, drafted.tokens, len(prompt), alpha) if alpha else contextlib.nullcontext():
                trace = session.generate(prompt, num_draft_tokens=None if alpha else 0, **options).finish()
            whatever_drafts = whatever_drafts and trace.tokens == (drafted if alpha else plain).tokens
            seconds[alpha] += trace.stats.generate_wall_ms / 1000.0
            if alpha:
                per_round[alpha] = round(trace.stats.round_tokens / max(trace.stats.rounds, 1), 2)
    compared = compare_tokens(
        "",
        plain.tokens,
        drafted.tokens,
        margins=plain.margins,
        tolerance=TOLERANCES.get(session.manifest.recipe, max(TOLERANCES.values())),
        max_new_tokens=new_tokens,
    )
    speeds = {alpha: 2 * (new_tokens - 1) / taken for alpha, taken in seconds.items()}
    return {
        "same_output": whatever_drafts and compared.verdict != "different",
        "same_whatever_the_drafts": whatever_drafts,
        "against_plain": {"verdict": compared.verdict, "token": compared.first_difference, "margin": compared.margin},
        "distinct_tokens": len(set(plain.tokens)),
        "plain_tokens_per_second": round(speeds[0.0], 2),
        "gain_at_alpha": {str(alpha): round(speeds[alpha] / speeds[0.0], 3) for alpha in ALPHAS},
        "committed_per_round": per_round,
    }


@contextlib.contextmanager
def imposed(session: Session, tokens: Sequence[int], prompt_length: int, alpha: float) -> Iterator[None]:
    """Let drafts be the target's own next words with a chance of `alpha` each, after the first that is not, wrong."""
    backend, source = session.backend, random.Random(0)
    own = backend.draft
    state = {"filled": -1, "step": 0}

    def draft(token_id: int, activations: FloatArray, *, with_candidates: bool = False) -> Draft:
        said = own(token_id, activations, with_candidates=with_candidates)
        filled = backend.kv_cache.filled_length
        state["step"] = state["step"] + 1 if state["filled"] == filled else 0
        state["filled"] = filled
        # The pending token, at `filled`, is output number filled - prompt_length; the first draft is the one after it.
        number = filled - prompt_length + 1 + state["step"]
        right = tokens[number] if number < len(tokens) else 0
        return said._replace(best=right if source.random() < alpha else (right + 1) % session.manifest.vocab_size)

    backend.draft = draft  # type: ignore[method-assign]
    try:
        yield
    finally:
        backend.draft = own  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
