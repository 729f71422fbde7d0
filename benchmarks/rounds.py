"""What a pass and a round of a bundle take, and what MTP would gain at an imposed acceptance; as JSON.

    python -m benchmarks.rounds BUNDLE [--threads 2] [--filled 500] [--new-tokens 48] [--start-only]

Acceptance is a property of weights and text, and synthetic weights have none. So drafts are imposed: the drafter runs
and costs what it costs, and its word is replaced by the target's own next one as often as alpha says, by a wrong one
otherwise. Plain decoding and rounds of every alpha take turns in one run. Where a near-tie makes a run leave what is
imposed, its drafts are wrong from there on; `gain_by_passes` is what the times of passes give without that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtp_runtime import Session
from mtp_runtime.measure.timing import expected_committed, filled_prompt, round_ms, time_passes, time_rounds

ALPHAS = (0.6, 0.8)


def main() -> int:
    """Measure and print; return 1 if drafts changed what is said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--filled", type=int, default=500, help="positions that are filled before passes are timed")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--start-only", action="store_true", help="open, say a few tokens and time no more")
    options = parser.parse_args()
    started = time.perf_counter()
    with Session.open(options.bundle, threads=options.threads, verify=False) as session:
        figures: dict[str, Any] = {"open_s": round(time.perf_counter() - started, 2), "threads": options.threads}
        prompt = filled_prompt(session, options.filled)
        started = time.perf_counter()
        session.generate(prompt, max_new_tokens=8, stop_token_ids=()).finish()
        figures["first_answer_s"] = round(time.perf_counter() - started, 2)
        if options.start_only:
            print(json.dumps(figures | {"memory_bytes": memory()}))
            return 0
        passes = {name: round(timing.median_ms, 3) for name, timing in time_passes(session, prompt).items()}
        figures |= {"memory_bytes": memory(), "passes_ms": passes}
        figures |= rounds(session, prompt, options.new_tokens)
        k = session.manifest.num_draft_tokens
        of_round = passes["decode"] / round_ms(passes, k)
        gains = {str(alpha): round(expected_committed(alpha, k) * of_round, 3) for alpha in ALPHAS}
        figures["gain_by_passes"] = gains
    print(json.dumps(figures))
    return 0 if figures["same_output"] else 1


def memory() -> dict[str, int]:
    """Return what this process has in memory: without a file behind it, and mapped from files."""
    status = Path("/proc/self/status").read_text()
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("Rss")}
    return {"anonymous": sizes["RssAnon"], "mapped": sizes["RssFile"]}


def rounds(session: Session, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """Return committed tokens per second, plainly and at every alpha, in turn."""
    plain, *imposed = time_rounds(session, prompt, new_tokens, ALPHAS)
    return {
        "same_output": all(row.same_output for row in (plain, *imposed)),
        "distinct_tokens": plain.distinct_tokens,
        "plain_tokens_per_second": round(1000.0 / plain.ms_per_token, 2),
        "gain_at_alpha": {str(row.alpha): round(plain.ms_per_token / row.ms_per_token, 3) for row in imposed},
        "committed_per_round": {str(row.alpha): round(row.committed_per_round, 2) for row in imposed},
    }


if __name__ == "__main__":
    sys.exit(main())
