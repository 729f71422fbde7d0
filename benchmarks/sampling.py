"""What do drafts bring when tokens are sampled, and is the output then still the target's?

Every prompt is generated greedily and under each temperature: plainly, and with drafts under both rules (sampling.py),
in turn and in one run, so that a machine that slows down slows all alike. Then a few prompts are continued many times
with other seeds: the tokens that follow each prefix are counted plainly and with drafts, and compared by chi-square.

    python -m benchmarks.sampling [BUNDLE]

Without a bundle, nano is exported at int8 into build/. Goal: every p-value above 0.001.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as statistics

from benchmarks.bundles import exported
from benchmarks.machine import write_result
from mtp_export.check.prompts import heldout_prompts, of_kind
from mtp_runtime import GenerationStats, Sampling, Session
from mtp_runtime.generate.sampling import Method
from mtp_runtime.generate.stats import overall_acceptance_rate, overall_committed_per_round, overall_tokens_per_second

GOAL = 0.001
TEMPERATURES = (0.3, 0.7, 1.0)
# How many tokens of each answer are counted: the first is the prompt's, the others are a round's.
COUNTED = 5
# A prefix is compared where it was met this often each way, and a token of its own where it was seen this often.
MET, SEEN = 60, 20


class Way(NamedTuple):
    """A way to generate: `rule` is plain, match or speculative; temperature 0 is greedy."""

    temperature: float
    rule: str

    def options(self, session: Session, **more: Any) -> dict[str, Any]:
        method: Method = "speculative" if self.rule == "speculative" else "match"
        return {
            "num_draft_tokens": 0 if self.rule == "plain" else session.manifest.num_draft_tokens,
            "sampling": Sampling(temperature=self.temperature, method=method, **more),
        }


def main() -> int:
    """Measure, print and write the result; return 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=8, help="of each kind, for the speed")
    parser.add_argument("--answers", type=int, default=250, help="to each of three prompts, each way, for the counts")
    parser.add_argument("--threads", type=int, default=1, help="nano is too small for a second thread to help")
    options = parser.parse_args()
    path = options.bundle or exported(1024, "int8")
    figures: dict[str, Any] = {name: getattr(options, name) for name in ("threads", "max_new_tokens", "answers")}
    with Session.open(path, threads=options.threads) as session:
        figures |= {"model": session.manifest.model, "recipe": session.manifest.recipe, "kinds": {}}
        figures["num_draft_tokens"] = session.manifest.num_draft_tokens
        for kind in ("code", "prose"):
            prompts = [prompt.text for prompt in of_kind(heldout_prompts(), kind)[: options.prompts]]
            figures["kinds"][kind] = measure(session, prompts, options.max_new_tokens)
        prompts = [
            prompt.text for kind, n in (("code", 2), ("prose", 1)) for prompt in of_kind(heldout_prompts(), kind)[:n]
        ]
        figures["distribution"] = [
            row for temperature in (0.7, 1.0) for row in compare(session, prompts, temperature, options.answers)
        ]
    print_tables(figures)
    print(f"written: {write_result('sampling', figures)}")
    worst = min(row["p_value"] for row in figures["distribution"])
    print(f"smallest p-value: {worst:.3f}, goal above {GOAL}")
    return 0 if worst > GOAL else 1


def measure(session: Session, prompts: list[str], max_new_tokens: int) -> list[dict[str, Any]]:
    """Time every way over the prompts, after a round that warms up."""
    ways = [Way(0.0, "plain"), Way(0.0, "match")]
    ways += [Way(temperature, rule) for temperature in TEMPERATURES for rule in ("plain", "match", "speculative")]
    runs: dict[Way, list[GenerationStats]] = {way: [] for way in ways}
    for seed, prompt in enumerate([prompts[0], *prompts]):
        for way in ways:
            options = way.options(session, seed=seed)
            trace = session.generate(prompt, max_new_tokens=max_new_tokens, stop_token_ids=(), **options).finish()
            if seed:
                runs[way].append(trace.stats)
    return [
        {
            "temperature": way.temperature,
            "rule": "greedy" if way == Way(0.0, "match") else way.rule,
            "tokens_per_second": round(speed(stats), 1),
            "speed_up": round(speed(stats) / speed(runs[Way(way.temperature, "plain")]), 3),
            "acceptance_rate": round(overall_acceptance_rate(stats) or 0.0, 3),
            "committed_per_round": round(overall_committed_per_round(stats) or 0.0, 3),
            "accept_ms_per_token": round(sum(s.accept_ms for s in stats) / sum(s.committed_tokens for s in stats), 4),
        }
        for way, stats in runs.items()
    ]


def speed(runs: list[GenerationStats]) -> float:
    """Return committed tokens per second after each prompt's first token, which its prefill yields."""
    return overall_tokens_per_second(runs) or 0.0


def compare(session: Session, prompts: list[str], temperature: float, answers: int) -> list[dict[str, Any]]:
    """Return how likely plain tokens, and those of each rule, are to differ as much as they do by chance."""
    # Seeds are never shared: under one seed the match rule says the very tokens of plain sampling.
    counts = {
        rule: [
            followers(session, session.tokenize(prompt), Way(temperature, rule), range(first, first + answers))
            for prompt in prompts
        ]
        for first, rule in zip(range(0, 3 * answers, answers), ("plain", "match", "speculative"), strict=True)
    }
    rows = []
    for rule in ("match", "speculative"):
        statistic, freedom, draws = 0.0, 0, 0
        for plain, drafted in zip(counts["plain"], counts[rule], strict=True):
            for prefix in plain.keys() & drafted.keys():
                pair = [plain[prefix], drafted[prefix]]
                if prefix and min(count.total() for count in pair) >= MET:
                    test, degrees = difference(pair)
                    statistic, freedom = statistic + test, freedom + degrees
                    draws += sum(count.total() for count in pair)
        p_value = float(statistics.chi2.sf(statistic, freedom))
        rows.append(
            {
                "temperature": temperature,
                "rule": rule,
                "draws": draws,
                "chi_square": round(statistic, 2),
                "degrees_of_freedom": freedom,
                "p_value": round(p_value, 6),
            }
        )
    return rows


def followers(session: Session, ids: list[int], way: Way, seeds: range) -> dict[tuple[int, ...], Counter[int]]:
    """Count what followed each prefix of the answers to a prompt."""
    counts: dict[tuple[int, ...], Counter[int]] = {}
    session.generate(ids, max_new_tokens=1).finish()
    for seed in seeds:
        options = way.options(session, seed=seed)
        answer = session.generate(
            ids, max_new_tokens=COUNTED, stop_token_ids=(), keep_length=len(ids) - 1, **options
        ).finish()
        for length, token in enumerate(answer.tokens):
            counts.setdefault(answer.tokens[:length], Counter())[token] += 1
    return counts


def difference(counts: list[Counter[int]]) -> tuple[float, int]:
    """Return the chi-square statistic of two counts and its degrees of freedom; rare tokens are one class."""
    total = counts[0] + counts[1]
    usual = [token for token in total if total[token] >= SEEN]
    table = np.array([[*(c[token] for token in usual), c.total() - sum(c[token] for token in usual)] for c in counts])
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2:
        return 0.0, 0
    test = statistics.chi2_contingency(table, correction=False)
    return float(test.statistic), int(test.dof)


def print_tables(figures: dict[str, Any]) -> None:
    print(f"{figures['model']}, {figures['recipe']}, K = {figures['num_draft_tokens']}, {figures['threads']} threads")
    print("kind   temperature rule          tok/s  speed-up  accepted  committed/round  accept ms/token")
    for kind, rows in figures["kinds"].items():
        for row in rows:
            print(
                f"{kind:6} {row['temperature']:11} {row['rule']:12} {row['tokens_per_second']:6.0f} "
                f"{row['speed_up']:8.2f}x {row['acceptance_rate']:9.2f} {row['committed_per_round']:16.2f} "
                f"{row['accept_ms_per_token']:16.3f}"
            )
    for row in figures["distribution"]:
        print(
            f"plain against {row['rule']:12} at {row['temperature']}: {row['draws']} draws, chi-square "
            f"{row['chi_square']:.1f} of {row['degrees_of_freedom']} degrees, p = {row['p_value']:.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
