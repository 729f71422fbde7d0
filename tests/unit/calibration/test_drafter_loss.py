"""The drafter's loss against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mtp_calibration.drafter.loss import centroid_targets, draft_loss, step_mean


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_draft_is_judged_by_the_choice_and_by_the_distribution(generator: torch.Generator) -> None:
    scores, logits = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    loss, right = draft_loss(scores, logits)
    hard = F.cross_entropy(scores.flatten(0, 1), logits.argmax(-1).flatten(), reduction="none").view(2, 5)
    soft = F.cross_entropy(scores.flatten(0, 1), logits.softmax(-1).flatten(0, 1), reduction="none").view(2, 5)
    torch.testing.assert_close(loss, 0.6 * hard + 0.4 * soft)
    assert right.equal(scores.argmax(-1) == logits.argmax(-1))


def test_a_draft_equal_to_the_target_loses_the_target_s_entropy(generator: torch.Generator) -> None:
    logits = 30 * torch.eye(6)
    loss, right = draft_loss(logits, logits)
    assert right.all()
    assert loss.max() < 1e-6


def test_a_step_that_no_round_reaches_counts_three_tenths() -> None:
    loss = torch.tensor([1.0, 1.0])
    assert float(step_mean(loss, torch.tensor([1.0, 0.0]))) == pytest.approx(0.65)


def test_the_cluster_of_a_token_follows_from_the_ordering() -> None:
    ordering = torch.tensor([4, 0, 3, 1, 5, 2])
    assert centroid_targets(ordering, 3, torch.tensor([[0, 1], [2, 4]])).tolist() == [[0, 1], [2, 0]]
