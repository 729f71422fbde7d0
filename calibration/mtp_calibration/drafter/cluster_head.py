"""Clusters for a drafter whose head is dense, so that it has the two-stage lookup as published drafters have it.

Tokens are clustered by their embedding; centroids learn, on the states that the drafter has along the target's own
answers, in which cluster its dense first choice is. The result is written as a checkpoint of transformers with
ordered embeddings.

Shapes: N states, D the drafter's hidden size, C clusters, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtp_calibration.drafter.answers import Answer, Answering, answered
from mtp_calibration.drafter.clusters import balanced_clusters, cluster_means
from mtp_calibration.drafter.rounds import rounds
from mtp_export.source.checkpoint import Checkpoint
from mtp_runtime.errors import UserError

_BATCH = 512
_SOFT = 5.0  # temperature of the softened scores
_BLOCK = 256  # states whose dense scores are computed at a time


def drawn_answers(
    target: Any,
    prompts: Sequence[Sequence[int]],
    stop_token_ids: Sequence[int],
    *,
    beginnings: int,
    max_new_tokens: int,
    seed: int,
) -> list[Answer]:
    """Return the target's answers, drawn, to prompts and to `beginnings` single tokens of its whole vocabulary."""
    vocab = target.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (beginnings,), generator=generator).tolist()
    answering = Answering(
        stop_token_ids=stop_token_ids, max_new_tokens=max_new_tokens, batch=32, seed=seed, drawn_every=1
    )
    return answered(target, [*prompts, *([prompts[0][0], token] for token in tokens)], answering)


@torch.no_grad()
def drafter_states(target: Any, drafter: Any, answers: Sequence[Answer], *, batch: int, position_offset: int) -> Tensor:
    """Return the head's inputs in the rounds that begin at every token of the answers. Shapes: -> [N,D]"""
    states = []
    for at in range(0, len(answers), batch):
        states += [hidden for hidden, _ in rounds(target, drafter, answers[at : at + batch], position_offset)]
    return torch.cat(states)


@torch.no_grad()
def dense_choices(hidden: Tensor, embedding: Tensor) -> Tensor:
    """Return the dense first choice of each state. Shapes: hidden [N,D], embedding [V,D] -> [N]"""
    return torch.cat([(block @ embedding.T).argmax(-1) for block in torch.split(hidden, _BLOCK)])


def recall(hidden: Tensor, clusters: Tensor, centroids: Tensor, top_k: int) -> float:
    """Return the share of states whose own cluster is among the best.

    Shapes: hidden [N,D], clusters [N], centroids [C,D]
    """
    best = (hidden @ centroids.T).topk(top_k, -1).indices
    return float((best == clusters[:, None]).any(-1).float().mean())


def trained_centroids(
    hidden: Tensor,
    embedding: Tensor,
    ordering: Tensor,
    *,
    steps: int,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda number: None,
) -> Tensor:
    """Return centroids that score a cluster as the dense head scores its best token, from the means of the clusters.

    Shapes: hidden [N,D], embedding [V,D], ordering [C, V / C] -> [C,D]
    """
    count = len(ordering)
    centroids = cluster_means(embedding, ordering).requires_grad_(True)
    rate = 0.1 * float(centroids.detach().square().mean().sqrt())
    optimiser = torch.optim.Adam([centroids], lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for number in range(steps):
        chosen = hidden[torch.randint(len(hidden), (_BATCH,), generator=generator)]
        best = (chosen @ embedding.T)[:, ordering.reshape(-1)].view(len(chosen), count, -1).amax(-1)
        scores = chosen @ centroids.T
        # Sharp, for the first choice; and softened, for clusters that are never first along these answers.
        loss = F.cross_entropy(scores, best.softmax(-1))
        loss = loss + _SOFT * F.cross_entropy(scores / _SOFT, (best / _SOFT).softmax(-1))
        optimiser.param_groups[0]["lr"] = rate * (1 - number / steps)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        on_step(number + 1)
    return centroids.detach()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clustering:
    """How a dense drafter gets clusters. count: C; top_k: clusters that are scored for a draft; steps: of training."""

    count: int
    top_k: int
    steps: int
    position_offset: int


class Clusters(NamedTuple):
    """The clusters of a drafter, and the share of dense first choices that the best of them hold.

    Shapes: ordering [C, V / C], centroids [C,D]
    """

    ordering: Tensor
    centroids: Tensor
    recall: float


def cluster(
    target: Any,
    drafter: Any,
    answers: Sequence[Answer],
    options: Clustering,
    *,
    on_stage: Callable[[str], None] = lambda name: None,
) -> Clusters:
    """Build the clusters of a dense drafter. Every eighth answer is kept apart, and the recall is that along them."""
    on_stage("states of the drafter")
    embedding = drafter.lm_head.weight.detach().float()
    apart = answers[::8]
    rest = [answer for number, answer in enumerate(answers) if number % 8] or apart
    hidden, check = (
        drafter_states(target, drafter, some, batch=8, position_offset=options.position_offset).cpu()
        for some in (rest, apart)
    )
    embedding = embedding.cpu()
    on_stage("clusters")
    ordering = balanced_clusters(embedding.clone(), options.count)
    on_stage("centroids")
    centroids = trained_centroids(hidden, embedding, ordering, steps=options.steps)
    cluster_of_token = torch.empty(len(embedding), dtype=torch.long)
    cluster_of_token[ordering] = torch.arange(options.count)[:, None].expand_as(ordering)
    own = cluster_of_token[dense_choices(check, embedding)]
    return Clusters(ordering, centroids, recall(check, own, centroids, options.top_k))


def write_clustered(dense: Checkpoint, ordering: Tensor, centroids: Tensor, top_k: int, output: Path) -> None:
    """Write the drafter with its clusters, as a checkpoint in one file."""
    beside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    stored: dict[str, Tensor] = {}
    for path in dense.files():
        if path.suffix == ".safetensors":
            stored |= load_file(path)
        elif not path.name.endswith((".index.json", "config.json")):
            shutil.copy(path, beside / path.name)
    tensors = {name: stored[info.stored] for name, info in dense.tensors.items()}
    tensors |= {
        "masked_embedding.token_ordering": ordering.reshape(-1),
        "masked_embedding.centroids.weight": centroids.to(tensors[dense.head].dtype),
    }
    save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
    config = dense.config | {
        "use_ordered_embeddings": True,
        "num_centroids": len(ordering),
        "centroid_intermediate_top_k": top_k,
    }
    (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, output)


def check_dense(drafter: Checkpoint, count: int, top_k: int) -> None:
    """Check that a drafter is dense and can have `count` clusters.

    Raises:
        UserError: the drafter has clusters already, or cannot have so many.
    """
    vocab = drafter.config.get("text_config", {}).get("vocab_size")
    if drafter.config.get("use_ordered_embeddings", True):
        raise UserError(f"{drafter.folder} has clusters already: export it as it is")
    if not isinstance(vocab, int) or count < 1 or vocab % count:
        raise UserError(f"--clusters {count} does not divide a vocabulary of {vocab}: give a divisor of it")
    if not 1 <= top_k <= count:
        raise UserError(f"--top-k is {top_k}, expected 1 to {count}")
