"""The near-tie rule and the report."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_runtime.measure.parity import (
    Comparison,
    ParityReport,
    RunnerResult,
    common_length,
    common_pieces,
    compare_text,
    compare_tokens,
)

MARGINS = [1.0, 0.5, 0.001, 2.0]


def compare(reference: list[int], tokens: list[int], margins: list[float] = MARGINS) -> Comparison:
    return compare_tokens("p", reference, tokens, margins=margins, tolerance=0.01, max_new_tokens=4)


def test_equal_outputs_are_equal() -> None:
    comparison = compare([1, 2, 3, 4], [1, 2, 3, 4])
    assert (comparison.verdict, comparison.agreed, comparison.compared, comparison.first_difference) == (
        "equal",
        4,
        4,
        None,
    )


@pytest.mark.parametrize(
    ("tokens", "position", "margin", "verdict"),
    [
        ([9, 2, 3, 4], 0, 1.0, "different"),
        ([1, 2, 9, 9], 2, 0.001, "near_tie"),
        ([1, 2, 3, 9], 3, 2.0, "different"),
        ([1, 2], 2, 0.001, "near_tie"),
        ([], 0, 1.0, "different"),
    ],
)
def test_only_the_margin_at_the_first_difference_counts(
    tokens: list[int], position: int, margin: float, verdict: str
) -> None:
    comparison = compare([1, 2, 3, 4], tokens)
    assert (comparison.first_difference, comparison.margin, comparison.verdict) == (position, margin, verdict)


def test_a_margin_of_exactly_the_tolerance_is_a_near_tie() -> None:
    assert compare([1], [2], [0.01]).verdict == "near_tie"
    assert compare([1], [2], [0.0101]).verdict == "different"


def test_going_on_after_the_reference_ended_is_a_difference() -> None:
    comparison = compare([1, 2], [1, 2, 3], [0.0, 0.0])
    assert (comparison.first_difference, comparison.margin, comparison.verdict) == (2, None, "different")


def test_tokens_beyond_the_limit_are_not_compared() -> None:
    assert compare([1, 2, 3, 4], [1, 2, 3, 4, 5]).verdict == "equal"


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6))
def test_the_tokens_that_agree_are_the_common_prefix(reference: list[int], tokens: list[int]) -> None:
    comparison = compare_tokens("p", reference, tokens, margins=[1.0] * 6, tolerance=0.0, max_new_tokens=6)
    assert reference[: comparison.agreed] == tokens[: comparison.agreed]
    assert (comparison.verdict == "equal") == (reference == tokens)


def test_text_is_compared_token_by_token() -> None:
    pieces = ["def", " add", "(", "a"]
    equal = compare_text("p", pieces, "def add(a, b", margins=MARGINS, tolerance=0.01)
    assert (equal.verdict, equal.agreed) == ("equal", 4)
    tie = compare_text("p", pieces, "def add[a", margins=MARGINS, tolerance=0.01)
    assert (tie.verdict, tie.first_difference, tie.margin) == ("near_tie", 2, 0.001)
    short = compare_text("p", pieces, "def add(", margins=MARGINS, tolerance=0.01)
    assert (short.verdict, short.first_difference) == ("different", 3)


def test_a_reference_without_margins_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="4 reference tokens have 1 margins"):
        compare([1, 2, 3, 4], [1, 2, 3, 4], [1.0])


def report(*verdicts: list[int]) -> ParityReport:
    return ParityReport(
        model="nano",
        recipe="int8",
        reference="plain",
        tolerance=0.01,
        max_new_tokens=4,
        results=tuple(
            RunnerResult(
                runner="mtp_runtime",
                num_draft_tokens=index,
                tokens_per_second=12.0,
                acceptance_rate=0.5 if index else None,
                committed_per_round=2.25 if index else None,
                comparisons=(compare([1, 2, 3, 4], tokens),),
            )
            for index, tokens in enumerate(verdicts)
        ),
    )


def test_a_report_passes_with_near_ties_and_fails_with_a_difference() -> None:
    assert report([1, 2, 3, 4], [1, 2, 9]).passed
    assert not report([1, 2, 3, 4], [1, 9]).passed


def test_a_report_reads_as_json_and_as_markdown() -> None:
    whole = report([1, 2, 3, 4], [1, 2, 9])
    document = json.loads(whole.to_json())
    assert document["passed"] is True
    assert document["results"][1]["comparisons"][0]["first_difference"] == 2
    markdown = whole.to_markdown()
    assert "# Parity of nano, recipe int8: passed" in markdown
    assert "| mtp_runtime | – | 0.01 | 1 | 0 | 0 | 4 of 4 | – | – | 12 |" in markdown
    assert "| mtp_runtime | 1 | 0.01 | 0 | 1 | 0 | 2 of 4 | 0.500 | 2.25 | 12 |" in markdown
    assert "- mtp_runtime, K = 1, p: token 2, margin 0.001: near-tie" in markdown


@given(st.lists(st.integers(0, 2), max_size=5), st.lists(st.integers(0, 2), max_size=5))
def test_the_common_length_is_where_two_sequences_first_differ(one: list[int], other: list[int]) -> None:
    length = common_length(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


@given(st.lists(st.text("ab", max_size=2), max_size=5), st.text("ab", max_size=8))
def test_common_pieces_are_the_beginning_of_a_text(pieces: list[str], text: str) -> None:
    count = common_pieces(pieces, text)
    assert text.startswith("".join(pieces[:count]))
    assert count == len(pieces) or not text.startswith("".join(pieces[: count + 1]))


def test_a_runner_without_a_tolerance_has_the_report_s() -> None:
    whole = report([1, 2, 3, 4])
    exact = msgspec.structs.replace(whole.results[0], tolerance=0.0)
    markdown = msgspec.structs.replace(whole, results=(exact, whole.results[0])).to_markdown()
    assert "| mtp_runtime | – | 0 | 1 |" in markdown
    assert "| mtp_runtime | – | 0.01 | 1 |" in markdown
