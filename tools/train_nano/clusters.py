"""Balanced spherical k-means: clusters of one size, as the published token ordering demands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS = 25


def balanced_clusters(rows: Tensor, count: int, seed: int) -> Tensor:
    """The token ordering: cluster after cluster, V / count tokens each. Shapes: rows [V, H] → [V], int64.

    Each round assigns greedily, best cosine first, while the wanted cluster has room; then the means move.
    """
    vocab = len(rows)
    if vocab % count:
        raise ValueError(f"{count} clusters do not divide a vocabulary of {vocab}")
    size = vocab // count
    unit = F.normalize(rows, dim=-1)
    generator = torch.Generator().manual_seed(seed)
    means = unit[torch.randperm(vocab, generator=generator)[:count]]
    ordering = torch.arange(vocab)
    for _ in range(ROUNDS):
        assigned = _assign(unit @ means.T, size)
        ordering = torch.argsort(assigned, stable=True)
        means = F.normalize(unit[ordering].view(count, size, -1).mean(1), dim=-1)
    return ordering


def _assign(cosines: Tensor, size: int) -> Tensor:
    """Each token's cluster, none with more than `size`. Shapes: [V, count] → [V]."""
    vocab, count = cosines.shape
    assigned = torch.full((vocab,), -1)
    open_ = cosines.clone()
    room = torch.full((count,), size)
    while bool((assigned < 0).any()):
        waiting = (assigned < 0).nonzero()[:, 0]
        best, wanted = open_[waiting].max(-1)
        for cluster in sorted(set(wanted.tolist())):
            asking = waiting[wanted == cluster]
            order = best[wanted == cluster].argsort(descending=True)
            taken = asking[order[: int(room[cluster])]]
            assigned[taken] = cluster
            room[cluster] -= len(taken)
        open_[:, room == 0] = -2.0
    return assigned


def cluster_means(rows: Tensor, ordering: Tensor, count: int) -> Tensor:
    """The mean embedding row of each cluster. Shapes: rows [V, H], ordering [V] → [count, H]."""
    return rows[ordering].view(count, -1, rows.shape[1]).mean(1)
