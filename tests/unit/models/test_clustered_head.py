"""The clustered head of several sequences against the one of a single row."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from mtp_export.models.clustered_head import ClusteredHead
from tests.support.clustered_heads import BATCH, HIDDEN, columns_of, random_head, random_hidden

DRAFTS = torch.ones(1, dtype=torch.int32)


@pytest.fixture(scope="module")
def hidden() -> Tensor:
    return random_hidden()


@pytest.fixture(scope="module")
def rows() -> ClusteredHead:
    return random_head()


@torch.no_grad()
def test_every_sequence_has_the_candidates_of_a_row_alone(rows: ClusteredHead, hidden: Tensor) -> None:
    ids, scores, best = columns_of(rows, quantised=False)(hidden)
    for b in range(BATCH):
        expected_ids, expected, _ = rows.candidates(hidden[b : b + 1])
        assert ids[b].equal(expected_ids)
        torch.testing.assert_close(scores[b], expected, atol=0, rtol=1e-4)  # sums in another order
        assert best[b] == expected_ids[expected.argmax()]


@torch.no_grad()
def test_quantised_scores_are_close_and_each_sequence_s_own(rows: ClusteredHead, hidden: Tensor) -> None:
    head = columns_of(rows, quantised=True)
    ids, scores, best = head(hidden)
    for b in range(BATCH):
        expected_ids, expected, _ = rows.candidates(hidden[b : b + 1])
        assert ids[b].equal(expected_ids)
        # Half a step of x at every weight, half a step of the table at every x, added up as if none cancelled.
        step = hidden[b].abs().max() / 126
        table = rows.table.abs().max() / 254
        bound = HIDDEN * (step * rows.table.abs().mean() + table * hidden[b].abs().mean()) * 2
        assert (scores[b] - expected).abs().max() < bound
        assert np.corrcoef(scores[b], expected)[0, 1] > 0.999
        for together, alone in zip((ids, scores, best), head(hidden[b : b + 1]), strict=True):
            assert together[b].equal(alone[0])


@torch.no_grad()
def test_a_token_that_may_not_be_drafted_scores_as_one_that_is_no_candidate(
    rows: ClusteredHead, hidden: Tensor
) -> None:
    before = rows(hidden[:1], DRAFTS)[0, 0]
    best = int(before.argmax())
    hides = copy.deepcopy(rows)
    hides.may_draft.data = (hides.token_ordering != best).float()
    after = hides(hidden[:1], DRAFTS)[0, 0]
    assert after[best] == 0
    others = torch.arange(len(before)) != best
    assert after[others].equal(before[others])


@torch.no_grad()
def test_a_head_that_holds_back_drafts_the_token_that_no_target_says(rows: ClusteredHead, hidden: Tensor) -> None:
    assert 0 not in rows.candidates(hidden[:1])[0]
    row = rows(hidden[:1], 1 - DRAFTS)[0, 0]
    assert row[0] > 0
    assert not row[1:].any()
