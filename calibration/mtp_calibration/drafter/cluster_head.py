"""Clusters for a drafter whose head is dense, so that it has the two-stage lookup as published drafters have it.

Tokens are clustered by their embedding; centroids learn, on the states that the drafter has along the target's own
answers, in which cluster its dense first choice is. What is written is a checkpoint of transformers with ordered
embeddings.

Shapes: N states, D the drafter's hidden size, C clusters, V vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtp_calibration.drafter.adapt import Answer, answered, rounds
from mtp_calibration.drafter.clusters import balanced_clusters, cluster_means
from mtp_export.source.checkpoint import Checkpoint
from mtp_runtime.errors import UserError

_BATCH = 512
_SOFT = 5.0  # temperature of the softened scores
_BLOCK = 256  # states whose dense scores are computed at a time


def drawn_answers(
    target: Any,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    *,
    beginnings: int,
    max_new_tokens: int,
    seed: int,
) -> list[Answer]:
    """What the target says, drawn, after prompts and after single tokens of its whole vocabulary, so many."""
    vocab = target.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (beginnings,), generator=generator).tolist()
    asked = [*prompts, *([prompts[0][0], token] for token in tokens)]
    return answered(target, asked, stops, max_new_tokens=max_new_tokens, batch=32, seed=seed, drawn_every=1)


@torch.no_grad()
def drafter_states(target: Any, drafter: Any, answers: Sequence[Answer], *, batch: int, position_offset: int) -> Tensor:
    """What the head is given in the rounds that begin at every token of the answers. Shapes: -> [N,D]"""
    found = []
    for at in range(0, len(answers), batch):
        found += [hidden for hidden, _ in rounds(target, drafter, answers[at : at + batch], position_offset)]
    return torch.cat(found)


@torch.no_grad()
def dense_choices(hidden: Tensor, embedding: Tensor) -> Tensor:
    """The dense first choice of each state. Shapes: hidden [N,D], embedding [V,D] -> [N]"""
    return torch.cat([(block @ embedding.T).argmax(-1) for block in torch.split(hidden, _BLOCK)])


def recall(hidden: Tensor, clusters: Tensor, centroids: Tensor, top_k: int) -> float:
    """Share of states whose own cluster is among the best. Shapes: hidden [N,D], clusters [N], centroids [C,D]"""
    found = (hidden @ centroids.T).topk(top_k, -1).indices
    return float((found == clusters[:, None]).any(-1).float().mean())


def trained_centroids(
    hidden: Tensor,
    embedding: Tensor,
    ordering: Tensor,
    *,
    steps: int,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda number: None,
) -> Tensor:
    """Centroids that score a cluster as the dense head scores its best token, from the means of the clusters.

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
        # Sharp, for the first choice; and softened, which tells of clusters that are never first along these answers.
        loss = F.cross_entropy(scores, best.softmax(-1))
        loss = loss + _SOFT * F.cross_entropy(scores / _SOFT, (best / _SOFT).softmax(-1))
        optimiser.param_groups[0]["lr"] = rate * (1 - number / steps)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        on_step(number + 1)
    return centroids.detach()


def cluster(
    target: Any,
    drafter: Any,
    answers: Sequence[Answer],
    *,
    count: int,
    top_k: int,
    steps: int,
    position_offset: int,
    on_stage: Callable[[str], None] = lambda name: None,
) -> tuple[Tensor, Tensor, float]:
    """Build the clusters of a dense drafter. Every eighth answer is kept apart, and the recall is that along them.

    Shapes: -> ordering [C, V / C], centroids [C,D], recall
    """
    on_stage("states of the drafter")
    embedding = drafter.lm_head.weight.detach().float()
    apart = answers[::8]
    rest = [answer for number, answer in enumerate(answers) if number % 8] or apart
    hidden, check = (
        drafter_states(target, drafter, some, batch=8, position_offset=position_offset).cpu() for some in (rest, apart)
    )
    embedding = embedding.cpu()
    on_stage("clusters")
    ordering = balanced_clusters(embedding.clone(), count)
    on_stage("centroids")
    centroids = trained_centroids(hidden, embedding, ordering, steps=steps)
    cluster_of_token = torch.empty(len(embedding), dtype=torch.long)
    cluster_of_token[ordering] = torch.arange(count)[:, None].expand_as(ordering)
    return ordering, centroids, recall(check, cluster_of_token[dense_choices(check, embedding)], centroids, top_k)


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
    """Raises:
    UserError: the drafter has clusters already, or cannot have so many.
    """
    vocab = drafter.config.get("text_config", {}).get("vocab_size")
    if drafter.config.get("use_ordered_embeddings", True):
        raise UserError(f"{drafter.folder} has clusters already: export it as it is")
    if not isinstance(vocab, int) or count < 1 or vocab % count:
        raise UserError(f"--clusters {count} does not divide a vocabulary of {vocab}: give a divisor of it")
    if not 1 <= top_k <= count:
        raise UserError(f"--top-k is {top_k}, expected 1 to {count}")
