"""Greedy acceptance: properties that hold whatever the drafts are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_runtime.generate.acceptance import accept_greedy, top_margin

TOKENS = st.integers(0, 5)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    drafts = draw(st.lists(TOKENS, max_size=6))
    choices = draw(st.lists(TOKENS, min_size=len(drafts) + 1, max_size=len(drafts) + 3))
    return drafts, choices


@given(rounds())
def test_committed_tokens_are_the_target_s_choices(case: tuple[list[int], list[int]]) -> None:
    drafts, choices = case
    accepted, next_token, _ = accept_greedy(drafts, choices)
    assert [*drafts[:accepted], next_token] == choices[: accepted + 1]


@given(rounds())
def test_acceptance_ends_at_the_first_disagreement(case: tuple[list[int], list[int]]) -> None:
    drafts, choices = case
    accepted, _, origin = accept_greedy(drafts, choices)
    if accepted < len(drafts):
        assert drafts[accepted] != choices[accepted]
        assert origin == "correction"
    else:
        assert origin == ("bonus" if drafts else "plain")


@given(st.lists(TOKENS, min_size=1, max_size=6), TOKENS)
def test_a_drafter_that_equals_the_target_is_accepted_whole(drafts: list[int], bonus: int) -> None:
    assert accept_greedy(drafts, [*drafts, bonus]) == (len(drafts), bonus, "bonus")


@given(rounds(), st.lists(TOKENS, max_size=4))
def test_rows_of_padding_change_nothing(case: tuple[list[int], list[int]], padding: list[int]) -> None:
    drafts, choices = case
    assert accept_greedy(drafts, choices) == accept_greedy(drafts, [*choices, *padding])


def test_too_few_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="2 drafts need 3 choices, got 2"):
        accept_greedy([1, 2], [1, 2])


def test_top_margin_is_first_minus_second() -> None:
    assert top_margin(np.array([1.0, 5.0, -2.0, 4.5], np.float32)) == 0.5
    assert top_margin(np.array([5.0, 5.0], np.float32)) == 0.0
    assert top_margin(np.array([-np.inf, 5.0, -np.inf], np.float32)) == np.finfo(np.float32).max
