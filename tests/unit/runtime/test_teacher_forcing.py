"""A fixed text is read at every position, and two readings are judged by the rule for near-ties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_runtime.backends.litert.static import StaticBackend
from mtp_runtime.errors import ContextFullError
from mtp_runtime.measure.teacher_forcing import FixedText, Reading, compare_readings, distances, read_fixed
from tests.support.fake_backend import FakeBackend, fake_manifest, next_token

TOKENS = st.lists(st.integers(2, 49), min_size=1, max_size=20).map(tuple)


def read(text: FixedText) -> Reading:
    manifest = fake_manifest()
    return read_fixed(StaticBackend(FakeBackend(manifest), manifest), manifest, text)


@settings(deadline=None, max_examples=25)
@given(TOKENS, TOKENS)
def test_each_position_sees_the_text_before_it(prompt: tuple[int, ...], answer: tuple[int, ...]) -> None:
    reading = read(FixedText(prompt_ids=prompt, tokens=answer))
    assert reading.choices == tuple(next_token([*prompt, *answer[:at]]) for at in range(len(answer)))
    # The first choice has the logit 1, all others have 0: of equals, the lower ids.
    assert [ids[0] for ids in reading.candidates] == list(reading.choices)
    assert reading.logits == ((1.0, *[0.0] * 7),) * len(answer)
    assert reading.margins == (1.0,) * len(answer)


def test_the_candidates_of_a_text_are_read() -> None:
    prompt, answer = (5, 6), (7, 8, 9)
    candidates = tuple((next_token([*prompt, *answer[:at]]), 0) for at in range(3))
    reading = read(FixedText(prompt_ids=prompt, tokens=answer, candidates=candidates))
    assert reading.candidates == candidates
    assert reading.logits == ((1.0, 0.0),) * 3


def test_a_text_without_an_answer_has_no_position() -> None:
    assert read(FixedText(prompt_ids=(3, 4), tokens=())) == Reading(choices=(), candidates=(), logits=())


def test_a_text_beyond_the_context_is_refused() -> None:
    with pytest.raises(ContextFullError, match="a text of 62 tokens does not fit the context of 60"):
        read(FixedText(prompt_ids=(3,) * 60, tokens=(4, 5)))


def reading(*rows: tuple[float, ...], choices: tuple[int, ...] = (0, 0, 0)) -> Reading:
    """Of positions whose candidates are the tokens 0, 1, …"""
    return Reading(choices=choices, candidates=tuple(tuple(range(len(row))) for row in rows), logits=rows)


HOST = reading((5.0, 1.0), (5.0, 4.7), (5.0, 4.9))


@pytest.mark.parametrize(
    ("choices", "agreed", "position", "verdict"),
    [
        ((0, 0, 0), 3, None, "equal"),
        ((0, 0, 1), 2, 2, "near_tie"),
        ((0, 1, 1), 1, 1, "near_tie"),
        ((1, 0, 1), 1, 0, "different"),
    ],
)
def test_the_difference_with_the_largest_margin_decides(
    choices: tuple[int, ...], agreed: int, position: int | None, verdict: str
) -> None:
    there = reading(*HOST.logits, choices=choices)
    comparison = compare_readings("p", HOST, there, tolerance=0.5)
    assert (comparison.compared, comparison.agreed) == (3, agreed)
    assert (comparison.first_difference, comparison.verdict) == (position, verdict)


def test_readings_of_different_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="p: the readings have different candidates"):
        compare_readings("p", HOST, reading((5.0,), (5.0,), (5.0,)), tolerance=0.5)


def test_distances_are_the_largest_of_each_position() -> None:
    there = reading((5.25, 1.0), (5.0, 4.2), (5.0, 4.9))
    measured = distances([(HOST, there)])
    assert (measured.positions, measured.median) == (3, 0.25)
    assert measured.largest == pytest.approx(0.5)
    empty = Reading(choices=(), candidates=(), logits=())
    assert distances([(empty, empty)]).median is None
