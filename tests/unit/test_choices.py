"""What is chosen of a drafter, from accepted drafts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mtp_calibration.head import TopKRow, enough, position_test


def test_the_fewest_clusters_that_keep_almost_all_drafts() -> None:
    curve = [
        TopKRow(top_k=k, scored=k / 8, recall=1.0, target_recall=1.0, accepted_per_round=accepted)
        for k, accepted in ((1, 2.0), (2, 2.98), (4, 2.986), (8, 3.0))
    ]
    assert enough(curve) == 4  # 99.5 % of 3.0 are 2.985
    assert enough(curve[:2]) == 2


@pytest.mark.parametrize(
    ("before", "at", "default", "chosen"),
    [
        ([1, 1, 2, 1] * 30, [2, 3, 3, 2] * 30, 0, 1),  # clearly better at L
        ([2, 3, 3, 2] * 30, [1, 1, 2, 1] * 30, 1, 0),
        ([1, 2, 1, 2] * 30, [2, 1, 1, 2] * 30, 1, 1),  # no difference: the default stays
        ([1, 2, 1, 2] * 30, [2, 1, 1, 2] * 30, 0, 0),
    ],
)
def test_a_position_convention_is_chosen_only_if_it_is_clearly_better(
    before: list[int], at: list[int], default: int, chosen: int
) -> None:
    rounds: Any = SimpleNamespace(
        drafter=SimpleNamespace(spec=SimpleNamespace(head=SimpleNamespace(top_k=4))),
        accepted=lambda top_k, offset: (before, at)[offset],
    )
    assert position_test(rounds, default).chosen == chosen
