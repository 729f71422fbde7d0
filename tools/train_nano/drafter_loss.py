"""What the drafter and its centroids are trained on: rounds begun at every position of the target's own texts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_calibration.drafter.loss import DEPTH, STEP_WEIGHTS, draft_loss, step_mean
from tools.train_nano.model import Drafter, KeyValue, LanguageModel

StepLoss = Callable[[Drafter, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def target_view(model: LanguageModel, ids: Tensor) -> tuple[Tensor, dict[str, KeyValue], Tensor]:
    """Return what the drafter sees and imitates.

    Shapes: ids [B, T] → hidden [B, T, H], keys and values, logits [B, T, V].
    """
    with torch.no_grad():
        hidden, shared = model(ids)
        return hidden, shared, model.logits(hidden).to(torch.bfloat16)


def step_loss(drafter: Drafter, x: Tensor, logits: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
    """Return one step's loss and where its draft is the target's argmax.

    Shapes: x [B, T, H], logits [B, T, V], reached [B, T] → scalar, [B, T].
    """
    loss, right = draft_loss(drafter.logits(x), logits.float())
    return step_mean(loss, reached), right.float()


def chained_loss(drafter: Drafter, model: LanguageModel, ids: Tensor, judge: StepLoss) -> tuple[Tensor, Tensor]:
    """Return the loss of a round begun at every position, and the share of drafts that equal the target's argmax.

    Shapes: ids [B, T] → scalar, [steps]. Step j is fed token t + j and judged by the target's logits at t + j.
    """
    hidden, shared, logits = target_view(model, ids)
    starts = ids.shape[1] - DEPTH
    embedded = model.embed(ids).detach()
    shared = {kind: (k[:, :, :starts], v[:, :, :starts]) for kind, (k, v) in shared.items()}
    state = hidden[:, :starts]
    reached = torch.ones_like(ids[:, :starts], dtype=torch.float32)
    total = torch.zeros((), device=ids.device)
    agreement = []
    for j in range(1, DEPTH + 1):
        x, state = drafter(embedded[:, j : j + starts], state, shared)
        loss, right = judge(drafter, x, logits[:, j : j + starts], reached)
        total = total + STEP_WEIGHTS[j - 1] * loss
        agreement.append(right.mean())
        reached = reached * right
    return total, torch.stack(agreement)


def centroid_loss(drafter: Drafter, model: LanguageModel, ids: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of the centroid scores with the cluster of the dense argmax, and the recall at top-k.

    Shapes: ids [B, T], clusters [V] → scalar, scalar.
    """
    with torch.no_grad():
        hidden, shared, _ = target_view(model, ids)
        embedded = model.embed(ids)
        starts = ids.shape[1] - DEPTH
        shared = {kind: (k[:, :, :starts], v[:, :, :starts]) for kind, (k, v) in shared.items()}
        state, heads = hidden[:, :starts], []
        for j in range(1, DEPTH + 1):
            x, state = drafter(embedded[:, j : j + starts], state, shared)
            heads.append(x)
        x = torch.cat(heads)
        dense = drafter.logits(x)
        expected = clusters[dense.argmax(-1)]
        count = drafter.masked_embedding.centroids.out_features
        mass = torch.zeros(*dense.shape[:-1], count, device=dense.device)
        mass = mass.scatter_add_(-1, clusters.expand_as(dense), dense.softmax(-1))
    scores = drafter.masked_embedding.centroids(x).float()
    loss = F.cross_entropy(scores.flatten(0, -2), expected.flatten())
    loss = loss + 0.5 * F.cross_entropy(scores.flatten(0, -2), mass.flatten(0, -2))
    hits = (scores.topk(drafter.top_k, -1).indices == expected[..., None]).any(-1)
    return loss, hits.float().mean()
