"""Does MTP pay in the reference runtime, and where does a round's time go?

Every prompt of a kind is generated plainly and with each K in turn, round after round in one run, so that a machine
that slows down slows all alike. Figures are committed tokens per second of the generation loop, summed over prompts.

    python -m benchmarks.mtp_speed [BUNDLE]

Without a bundle, nano is exported at int8 into build/. Goal: at least 1.3 times plain on code, with the best K.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.bundles import exported
from benchmarks.machine import write_result
from mtp_export.check.prompts import heldout_prompts, of_kind
from mtp_runtime import GenerationStats, Session

GOAL = 1.3
PHASES = ("embed_ms", "decode_ms", "draft_ms", "verify_ms", "accept_ms")


def main() -> int:
    """Measure, print and write the result; return 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="nano is too small for a second thread to help")
    options = parser.parse_args()
    path = options.bundle or exported(1024, "int8")
    figures: dict[str, Any] = {"threads": options.threads, "max_new_tokens": options.max_new_tokens, "kinds": {}}
    with Session.open(path, threads=options.threads) as session:
        figures |= {"model": session.manifest.model, "recipe": session.manifest.recipe}
        for kind in ("code", "prose"):
            figures["kinds"][kind] = measure(session, kind, options.max_new_tokens, options.repeats)
    print_table(figures)
    print(f"written: {write_result('mtp_speed', figures)}")
    best = max(row["speed_up"] for row in figures["kinds"]["code"] if row["num_draft_tokens"])
    print(f"best on code: {best:.2f}x, goal {GOAL}x")
    return 0 if best >= GOAL else 1


def measure(session: Session, kind: str, max_new_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Time plain decoding and every K over the prompts of a kind."""
    depths = range(session.manifest.num_draft_tokens + 1)
    runs: dict[int, list[GenerationStats]] = {k: [] for k in depths}
    for repeat in range(repeats + 1):
        for prompt in of_kind(heldout_prompts(), kind):
            for k in depths:
                generation = session.generate(prompt.text, max_new_tokens=max_new_tokens, num_draft_tokens=k)
                trace = generation.finish()
                if repeat:  # the first time round warms up
                    runs[k].append(trace.stats)
    plain = speed(runs[0])
    return [
        {
            "num_draft_tokens": k,
            "tokens_per_second": round(speed(stats), 1),
            "speed_up": round(speed(stats) / plain, 3),
            "committed_per_round": round(per_round(stats), 3),
            "ms_per_token": {phase: round(per_token(stats, phase), 4) for phase in PHASES},
        }
        for k, stats in runs.items()
    ]


def speed(runs: list[GenerationStats]) -> float:
    """Return committed tokens per second after each prompt's first token, which its prefill yields."""
    return 1000.0 * sum(s.committed_tokens - 1 for s in runs) / sum(s.generate_wall_ms for s in runs)


def per_round(runs: list[GenerationStats]) -> float:
    rounds = sum(s.rounds for s in runs)
    return sum(s.round_tokens for s in runs) / rounds if rounds else 1.0


def per_token(runs: list[GenerationStats], phase: str) -> float:
    value: float = sum(getattr(s, phase) for s in runs) / sum(s.committed_tokens for s in runs)
    return value


def print_table(figures: dict[str, Any]) -> None:
    print(f"{figures['model']}, {figures['recipe']}, {figures['threads']} threads")
    for kind, rows in figures["kinds"].items():
        print(f"{kind:6} K   tok/s  speed-up  committed/round   ms per token: " + " ".join(p[:-3] for p in PHASES))
        for row in rows:
            phases = " ".join(f"{row['ms_per_token'][phase]:.3f}" for phase in PHASES)
            print(
                f"{'':6} {row['num_draft_tokens']} {row['tokens_per_second']:7.0f} {row['speed_up']:8.2f}x "
                f"{row['committed_per_round']:12.2f}        {phases}"
            )


if __name__ == "__main__":
    sys.exit(main())
