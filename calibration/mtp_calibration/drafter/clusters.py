"""Clusters of one size for a drafter whose head is dense: balanced spherical k-means of its embedding.

Each round finds every token's nearest means, then settles who goes where as in stable marriages: a token asks its
nearest mean first, a cluster keeps the nearest of those that ask, and who is turned away asks the next. The means move
to their tokens, and so on. Only a few nearest means of each token are kept, so memory is that of the embedding and a
block of cosines.

Shapes: V vocabulary, D hidden, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_runtime.errors import UserError

ROUNDS = 12
_NEAREST = 8  # means that a token may ask before it is placed where there is room
_BLOCK = 8192  # rows whose cosines are computed at a time


def balanced_clusters(
    rows: Tensor, count: int, *, seed: int = 0, rounds: int = ROUNDS, on_round: Callable[[int], None] = lambda n: None
) -> Tensor:
    """Return token ids in C clusters of V / C each, ids within a cluster in order. `rows` are normalised in place.

    Shapes: rows [V,D] float32 -> [C, V / C] int64

    Raises:
        UserError: the clusters do not divide the vocabulary.
    """
    vocab = len(rows)
    if count < 1 or vocab % count:
        raise UserError(f"{count} clusters do not divide a vocabulary of {vocab}: give a divisor of it")
    size = vocab // count
    for block in torch.split(rows, _BLOCK):
        F.normalize(block, dim=-1, out=block)
    generator = torch.Generator().manual_seed(seed)
    means = rows[torch.randperm(vocab, generator=generator)[:count]].clone()
    assigned = torch.zeros(vocab, dtype=torch.long)
    for number in range(rounds):
        assigned = _assign(rows, means, size)
        means = F.normalize(torch.zeros_like(means).index_add_(0, assigned, rows), dim=-1)
        on_round(number + 1)
    return torch.argsort(assigned, stable=True).reshape(count, size)


def _assign(rows: Tensor, means: Tensor, size: int) -> Tensor:
    """Return a cluster for every row, `size` rows each. Shapes: rows [V,D], means [C,D] -> [V]"""
    assigned = torch.full((len(rows),), -1)
    room = torch.full((len(means),), size)
    while (left := (assigned < 0).nonzero()[:, 0]).numel():
        open_ = (room > 0).nonzero()[:, 0]
        few = min(_NEAREST, len(open_))
        nearest = [(rows[block] @ means[open_].T).topk(few, -1) for block in torch.split(left, _BLOCK)]
        requests = torch.cat([block.indices for block in nearest])
        settled = _settle(torch.cat([block.values for block in nearest]), requests, room[open_])
        placed = settled >= 0
        assigned[left[placed]] = open_[settled[placed]]
        room -= torch.bincount(assigned[left[placed]], minlength=len(room))
    return assigned


def _settle(cosines: Tensor, requests: Tensor, room: Tensor) -> Tensor:
    """Return the stable marriage of rows and the clusters that they ask, each with so much room; -1 for the rest.

    Shapes: cosines and requests [N,few], in the order of asking; room [C] -> [N]
    """
    count, few = requests.shape
    turn = torch.zeros(count, dtype=torch.long)
    everyone = torch.arange(count)
    while True:
        asking = everyone[turn < few]
        current, near = requests[asking, turn[asking]], cosines[asking, turn[asking]]
        order = near.argsort(descending=True, stable=True)
        order = order[current[order].argsort(stable=True)]
        clusters = current[order]
        first = torch.searchsorted(clusters, torch.arange(len(room)))
        turned_away = order[torch.arange(len(order)) - first[clusters] >= room[clusters]]
        if not len(turned_away):
            settled = torch.full((count,), -1)
            settled[asking] = current
            return settled
        turn[asking[turned_away]] += 1


def cluster_means(rows: Tensor, ordering: Tensor) -> Tensor:
    """Return the mean of the embedding rows of each cluster. Shapes: rows [V,D], ordering [C,V/C] -> [C,D]"""
    return torch.stack([rows[tokens].mean(0) for tokens in ordering])
