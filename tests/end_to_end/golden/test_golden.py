"""nano generates here what the golden files have, and the near-tie rule judges their cases as it did."""

from __future__ import annotations

import msgspec
import pytest

from mtp_export.check.stock_runtime import parse_acceptance_rate, parse_warnings
from mtp_runtime.measure.parity import compare_tokens
from tests.conftest import Export
from tests.end_to_end.golden.__main__ import chats_of, judge, traces_of
from tests.end_to_end.golden.files import LOG, MAX_NEW_TOKENS, RECIPES, read_cases, read_chats, read_traces

# The golden traces are of another processor, whose kernels round differently (mtp_export/check/parity.py).
TOLERANCE = 0.05


def test_cases_of_the_near_tie_rule() -> None:
    cases = read_cases()
    assert {case.expected.verdict for case in cases if case.expected} == {"equal", "near_tie", "different"}
    for case in cases:
        assert judge(case) == case.expected, case.name


def test_the_log_of_the_stock_runtime() -> None:
    cases = [msgspec.json.decode(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    for case in cases:
        assert parse_acceptance_rate(case["line"]) == case["acceptance_rate"]
        assert parse_warnings(case["line"]) == case["warnings"]
    everything = "\n".join(case["line"] for case in [*cases, *cases])
    assert parse_warnings(everything) == [warning for case in cases for warning in case["warnings"]]


def test_chats_in_the_stock_runtime(export_nano: Export) -> None:
    """What Kotlin's core is held to: the messages that are handed over, and nano's replies."""
    assert chats_of(export_nano("int8")) == read_chats()


@pytest.mark.parametrize("recipe", RECIPES)
def test_nano_generates_the_golden_tokens(export_nano: Export, recipe: str) -> None:
    golden = [trace for trace in read_traces() if trace.recipe == recipe]
    traces = traces_of(recipe, export_nano(recipe))
    assert [(t.prompt, t.num_draft_tokens) for t in golden] == [(t.prompt, t.num_draft_tokens) for t in traces]
    for old, new in zip(golden, traces, strict=True):
        assert old.prompt_ids == new.prompt_ids
        verdict = compare_tokens(
            old.prompt,
            old.tokens,
            new.tokens,
            margins=old.margins,
            tolerance=TOLERANCE,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        assert verdict.verdict != "different", (
            f"{verdict}: if this is meant, python -m tests.end_to_end.golden writes them anew"
        )
        if verdict.verdict == "equal":
            assert old.pieces == new.pieces
            assert old.finish_reason == new.finish_reason
