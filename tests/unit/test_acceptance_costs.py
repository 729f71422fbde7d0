"""When drafts pay, from what passes cost."""

from __future__ import annotations

import pytest

from mtp_calibration.acceptance import Costs, committed


def test_committed_tokens_of_a_round() -> None:
    assert committed(0.0, 3) == 1
    assert committed(1.0, 3) == 4
    assert committed(0.5, 2) == pytest.approx(1 + 0.5 + 0.25)


def test_break_even_is_where_a_round_takes_as_long_as_its_tokens() -> None:
    costs = Costs(decode_ms=2.0, draft_ms=0.5, verify_ms=(2.5, 3.0))
    # One draft: 3 ms for 1 + a tokens of 2 ms each.
    assert costs.break_even(1) == pytest.approx(0.5)
    found = costs.break_even(2)
    assert found is not None
    assert costs.expected_speed_up(committed(found, 2), 2) == pytest.approx(1.0)


def test_drafts_that_never_pay() -> None:
    assert Costs(decode_ms=1.0, draft_ms=1.0, verify_ms=(1.5,)).break_even(1) is None
