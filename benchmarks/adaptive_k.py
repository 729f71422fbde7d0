"""Does a K that adapts cost what the best fixed K costs, and never more than plain decoding?

For code, prose and random bytes, each prompt is generated plainly, with each fixed K and with "auto" in turn, another
of them first each time, so that a machine that slows down slows all alike. Figures are committed tokens per second of
CPU time after each prompt's first token, summed over the prompts of a kind: there is one thread, and on a machine that
others use too, elapsed time says what they did. "auto" itself goes by elapsed time, which is all that a caller has. It
learns from its own rounds alone and keeps it from kind to kind: what finding out costs is in its figure.

    python -m benchmarks.adaptive_k [BUNDLE]

Random bytes make a hostile prompt, not a hostile answer: what was accepted is given, and a second kind of hostile text
has a drafter whose first choice is never right, which is as bad as it can get. Without a bundle, nano is exported at
int8 into build/.

Goals: on hostile text at most 5 % slower than plain, on code and prose at most 5 % slower than the best fixed K.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.bundles import exported
from benchmarks.machine import write_result
from mtp_export.check.prompts import heldout_prompts, of_kind
from mtp_runtime import GenerationStats, Session
from mtp_runtime.generate.backend import Draft, FloatArray
from mtp_runtime.generate.stats import overall_tokens_per_second

GOAL = 0.95
Depth = int | Literal["auto"]


class Run(NamedTuple):
    """One generation, and the CPU time that its rounds took."""

    stats: GenerationStats
    cpu_ms: float


class WrongDrafts:
    """A session's backend whose drafter costs what it costs and is, on demand, wrong as good as always."""

    def __init__(self, session: Session) -> None:
        """Take the place of the backend's `draft`."""
        self.wrong = False
        self._draft = session.backend.draft
        self._vocab_size = session.manifest.vocab_size
        session.backend.draft = self.draft  # type: ignore[method-assign]

    def draft(self, token_id: int, activations: FloatArray, *, with_candidates: bool = False) -> Draft:
        """Run the drafter, and say another token than it did."""
        draft = self._draft(token_id, activations, with_candidates=with_candidates)
        return draft._replace(best=(draft.best + 1) % self._vocab_size) if self.wrong else draft


def main() -> int:
    """Measure, print and write the result; return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    path = options.bundle or exported(1024, "int8")
    figures: dict[str, Any] = {"threads": 1, "max_new_tokens": options.max_new_tokens, "goal": GOAL}
    with Session.open(path, threads=1) as session:
        figures |= {"model": session.manifest.model, "recipe": session.manifest.recipe}
        figures["kinds"] = measure(session, options.max_new_tokens, options.repeats)
    print_table(figures)
    print(f"written: {write_result('adaptive_k', figures)}")
    return 0 if all(kind["of_goal_speed"] >= GOAL for kind in figures["kinds"].values()) else 1


def measure(session: Session, max_new_tokens: int, repeats: int) -> dict[str, Any]:
    """Time plain decoding, every fixed K and auto over the prompts of each kind, the kinds one after another."""
    texts: dict[str, list[str | list[int]]] = {
        kind: [prompt.text for prompt in of_kind(heldout_prompts(), kind)] for kind in ("code", "prose")
    }
    texts["random bytes"] = random_prompts(session, len(texts["code"]))
    texts["wrong drafts"] = list(texts["prose"])
    depths: list[Depth] = [*range(session.manifest.num_draft_tokens + 1), "auto"]
    drafts = WrongDrafts(session)
    for depth in depths[:-1]:  # binds every signature; auto has to learn by itself
        session.generate(texts["code"][0], max_new_tokens=max_new_tokens, num_draft_tokens=depth).finish()
    kinds = {}
    turn = 0
    for kind, prompts in texts.items():
        drafts.wrong = kind == "wrong drafts"
        runs: dict[Depth, list[Run]] = {depth: [] for depth in depths}
        for prompt in prompts * repeats:
            turn += 1
            for i in range(len(depths)):
                depth = depths[(turn + i) % len(depths)]
                generation = session.generate(
                    prompt, max_new_tokens=max_new_tokens, num_draft_tokens=depth, stop_token_ids=()
                )
                next(generation)
                started = time.process_time()
                stats = generation.finish().stats
                runs[depth].append(Run(stats, 1000.0 * (time.process_time() - started)))
        kinds[kind] = summary(runs, against_plain=kind not in ("code", "prose"))
    return kinds


def random_prompts(session: Session, count: int) -> list[str | list[int]]:
    """Prompts of 64 random bytes each, the same ones every time."""
    source = random.Random(0)
    return [session.tokenize(source.randbytes(64).decode("latin-1")) for _ in range(count)]


def summary(runs: dict[Depth, list[Run]], *, against_plain: bool) -> dict[str, Any]:
    """Return what a kind's runs come to; `of_goal_speed` is auto's speed in parts of the speed that its goal names."""
    speeds = {depth: speed(taken) for depth, taken in runs.items()}
    best = max((depth for depth in speeds if depth != "auto"), key=lambda depth: speeds[depth])
    columns = zip_longest(*(run.stats.rounds_by_num_drafts for run in runs["auto"]), fillvalue=0)
    return {
        "best_fixed": best,
        "of_goal_speed": round(speeds["auto"] / speeds[0 if against_plain else best], 3),
        "of_best_fixed": round(speeds["auto"] / speeds[best], 3),
        "of_plain": round(speeds["auto"] / speeds[0], 3),
        "auto_rounds_by_num_drafts": [sum(column) for column in columns],
        "rows": [
            {
                "num_draft_tokens": depth,
                "tokens_per_second": round(speeds[depth], 1),
                "speed_up": round(speeds[depth] / speeds[0], 3),
                "elapsed_tokens_per_second": round(elapsed_speed(taken), 1),
                "acceptance_rate": round(acceptance(taken), 3),
            }
            for depth, taken in runs.items()
        ],
    }


def speed(runs: Sequence[Run]) -> float:
    """Return committed tokens per second of CPU time, without each prompt's first token, which its prefill yields."""
    return 1000.0 * sum(run.stats.committed_tokens - 1 for run in runs) / sum(run.cpu_ms for run in runs)


def elapsed_speed(runs: Sequence[Run]) -> float:
    """Return the same per second on the clock."""
    return overall_tokens_per_second([run.stats for run in runs]) or 0.0


def acceptance(runs: Sequence[Run]) -> float:
    """Kept drafts per proposed draft."""
    return sum(run.stats.accepted for run in runs) / max(sum(run.stats.drafted for run in runs), 1)


def print_table(figures: dict[str, Any]) -> None:
    """Print a block a kind."""
    print(f"{figures['model']}, {figures['recipe']}, {figures['threads']} threads")
    for kind, rows in figures["kinds"].items():
        print(f"{kind:13} K      tok/s  speed-up  accepted")
        for row in rows["rows"]:
            print(
                f"{'':13} {row['num_draft_tokens']!s:4} {row['tokens_per_second']:7.0f} {row['speed_up']:8.2f}x "
                f"{row['acceptance_rate']:9.2f}"
            )
        print(
            f"{'':13} auto is {rows['of_best_fixed']:.3f} of the best fixed K ({rows['best_fixed']}), "
            f"{rows['of_plain']:.3f} of plain; goal reached to {rows['of_goal_speed']:.3f}, at least {GOAL}; "
            f"rounds by K: {rows['auto_rounds_by_num_drafts']}"
        )


if __name__ == "__main__":
    sys.exit(main())
