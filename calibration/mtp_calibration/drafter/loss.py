"""The drafter's loss: how far its drafts are from the target's choices, over the chained steps of a round.

A step that a greedy round would not have reached counts less. Nothing but torch is imported, so that the training of
nano uses the same loss.

Shapes: V vocabulary; leading axes are those of the caller's positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 4  # chained steps of a round
STEP_WEIGHTS = (1.0, 0.9, 0.8, 0.7)
_HARD = 0.6  # of the loss: cross-entropy with the target's choice; the rest with its distribution
_NOT_REACHED = 0.3  # weight of a step that a round would not have reached


def draft_loss(scores: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each draft, and which drafts are the target's choice.

    Shapes: scores of the drafter [...,V], logits of the target [...,V] -> [...], [...] bool
    """
    choices, log_q = logits.argmax(-1), scores.log_softmax(-1)
    hard = -log_q.gather(-1, choices[..., None])[..., 0]
    soft = -(logits.softmax(-1) * log_q).sum(-1)
    return _HARD * hard + (1 - _HARD) * soft, (scores.argmax(-1) == choices).detach()


def step_mean(loss: Tensor, reached: Tensor) -> Tensor:
    """Return the mean loss of a step. Shapes: loss [...], reached [...], 1 where a round would get there -> scalar"""
    return (loss * (_NOT_REACHED + (1 - _NOT_REACHED) * reached)).mean()


def centroid_targets(ordering: Tensor, num_centroids: int, tokens: Tensor) -> Tensor:
    """Return the cluster of each token. Shapes: ordering [V], tokens [...] -> [...]"""
    place = torch.empty_like(ordering)
    place[ordering] = torch.arange(len(place), device=place.device)
    return place[tokens] // (ordering.numel() // num_centroids)
