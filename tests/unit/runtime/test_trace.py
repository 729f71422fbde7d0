"""A generation's trace and statistics as values."""

from __future__ import annotations

import json

import pytest

from mtp_runtime.errors import UserError
from mtp_runtime.generate.stats import (
    GenerationStats,
    overall_acceptance_rate,
    overall_committed_per_round,
    overall_tokens_per_second,
)
from mtp_runtime.generate.trace import GenerationTrace


def trace() -> GenerationTrace:
    stats = GenerationStats(prompt_tokens=3, committed_tokens=5, decode_steps=1, generate_wall_ms=8.0)
    stats.count_round(drafted=4, accepted=2)
    stats.count_round(drafted=2, accepted=0)
    return GenerationTrace(
        model="nano",
        recipe="int8",
        num_draft_tokens=4,
        prompt_ids=(2, 5, 6),
        tokens=(7, 8, 9, 10, 11),
        origins=("plain", "accepted", "accepted", "correction", "correction"),
        margins=(),
        finish_reason="max_tokens",
        stats=stats,
    )


def test_a_trace_survives_its_json() -> None:
    assert GenerationTrace.from_json(trace().to_json()) == trace()


def test_the_json_tells_the_derived_figures() -> None:
    assert json.loads(trace().to_json())["summary"] == {
        "drafted": 6,
        "accepted": 2,
        "acceptance_rate": 2 / 6,
        "committed_per_round": 2.0,
        "tokens_per_second": 500.0,
    }


def test_rounds_are_counted_per_position() -> None:
    stats = trace().stats
    assert (stats.drafted_at, stats.accepted_at) == ([2, 2, 1, 1], [1, 1, 0, 0])


def test_figures_of_several_generations_are_of_their_sums() -> None:
    plain = GenerationStats(committed_tokens=9, decode_steps=8, generate_wall_ms=32.0)
    runs = [trace().stats, plain]
    assert overall_acceptance_rate(runs) == 2 / 6
    assert overall_committed_per_round(runs) == 2.0
    assert overall_tokens_per_second(runs) == 1000 * (4 + 8) / 40
    assert (overall_acceptance_rate([plain]), overall_committed_per_round([plain])) == (None, None)
    assert overall_tokens_per_second([]) is None


def test_figures_of_nothing_are_zero() -> None:
    assert set(GenerationStats().summary().values()) == {0.0}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 3}', "[" * 100_000])
def test_what_is_no_trace_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a generation trace"):
        GenerationTrace.from_json(text)
