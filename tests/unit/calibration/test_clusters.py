"""Clusters for dense heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mtp_calibration.drafter.clusters import balanced_clusters
from mtp_runtime.errors import UserError


def embedding(topics: int, each: int, noise: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(topics, 32, generator=generator)
    return centres.repeat_interleave(each, 0) + noise * torch.randn(topics * each, 32, generator=generator)


def spread(rows: torch.Tensor, ordering: torch.Tensor) -> float:
    """Mean cosine of tokens with the mean of their cluster."""
    unit = F.normalize(rows, dim=-1)
    means = F.normalize(torch.stack([unit[tokens].mean(0) for tokens in ordering]), dim=-1)
    return float(torch.stack([(unit[t] @ m).mean() for t, m in zip(ordering, means, strict=True)]).mean())


def test_clusters_are_a_permutation_of_one_size_and_always_the_same() -> None:
    rows = embedding(16, 40, 0.7)
    first, second = (balanced_clusters(rows.clone(), 16) for _ in range(2))
    assert first.shape == (16, 40)
    assert torch.equal(first.reshape(-1).sort().values, torch.arange(640))
    assert torch.equal(first, second)


def test_near_tokens_share_a_cluster() -> None:
    rows = embedding(16, 40, 0.7)
    drawn = torch.randperm(640, generator=torch.Generator().manual_seed(0)).reshape(16, 40)
    balanced = spread(rows, balanced_clusters(rows.clone(), 16))
    assert balanced > 0.6 > 0.3 > spread(rows, drawn)


def test_a_crowd_larger_than_a_cluster_is_divided() -> None:
    """Three quarters of all tokens are alike: most of them must go where they would not by themselves."""
    rows = torch.cat([embedding(1, 300, 0.05), embedding(10, 10, 0.05) + 1])
    ordering = balanced_clusters(rows.clone(), 20)
    assert torch.equal(ordering.reshape(-1).sort().values, torch.arange(400))


def test_clusters_that_do_not_divide_the_vocabulary_are_refused() -> None:
    with pytest.raises(UserError, match="7 clusters do not divide a vocabulary of 640"):
        balanced_clusters(embedding(16, 40, 0.7), 7)
