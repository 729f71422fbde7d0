"""Adaptation: a drafter learns to draft for a fine-tuned target, from the target's own answers to a user's prompts.

The target is transformers', frozen; the drafter too, at every position of an answer at once, as if a round began there:
four chained steps, each judged by the target's own distribution (Leviathan et al. 2023 say why that is acceptance). The
embedding and the clusters stay; centroids learn to find the dense first choice. The written drafter has the names, the
dtypes and the config of the drafter that it came from.

Shapes: N rounds of all texts, D the drafter's hidden size, V vocabulary.
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
from torch import Tensor, nn

from mtp_calibration.drafter.answers import Answer, Answering, answered
from mtp_calibration.drafter.loss import STEP_WEIGHTS, centroid_targets, draft_loss, step_mean
from mtp_calibration.drafter.models import load, merge_adapters, save_like
from mtp_calibration.drafter.rounds import rounds
from mtp_export.source.pair import Pair
from mtp_runtime.atomic import replacing, write_atomically
from mtp_runtime.errors import UserError

_WARM_UP = 20
_TEXTS, _STATE = "texts.json", "state.pt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptation:
    """How a drafter is adapted. save_every: steps between checkpoints; device: cpu or cuda."""

    steps: int
    batch: int
    learning_rate: float
    max_new_tokens: int
    position_offset: int
    seed: int
    save_every: int = 50
    device: str = "cpu"


class Step(NamedTuple):
    """The outcome of a training step: the loss, and the share of first drafts that are the target's choice."""

    number: int
    loss: float
    agreement: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """Called as the work goes on: at each stage, with its name, and after each training step."""

    on_stage: Callable[[str], None] = lambda name: None
    on_step: Callable[[Step], None] = lambda step: None


def adapt(
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    output: Path,
    options: Adaptation,
    *,
    resume: bool = False,
    watch: Watch = Watch(),
) -> None:
    """Adapt the pair's drafter and write it to the folder `output`; the work of a killed run lies beside it.

    Raises:
        UserError: the output exists, or there is work of a run with other inputs.
    """
    work, device = output.with_name(f".{output.name}.adapting"), torch.device(options.device)
    _prepare(output, work, _identity(pair, prompts, options), resume=resume)
    target, drafter = load(pair.target.folder, device), load(pair.drafter.folder, device, trained=True)
    merge_adapters(pair, target)
    watch.on_stage("answers of the target")
    answering = Answering(
        stop_token_ids=pair.stop_token_ids,
        max_new_tokens=options.max_new_tokens,
        batch=options.batch,
        seed=options.seed,
    )
    answers = _kept_answers(target, prompts, answering, work / _TEXTS)
    watch.on_stage("adapting")
    _train(target, drafter, answers, options, work / _STATE, watch.on_step)
    folder = work / "drafter"
    shutil.rmtree(folder, ignore_errors=True)
    save_like(pair.drafter, drafter, folder)
    os.replace(folder, output)
    shutil.rmtree(work)


def _prepare(output: Path, work: Path, identity: str, *, resume: bool) -> None:
    """Make the folder that work is kept in, or check the one of a killed run.

    Raises:
        UserError: see `adapt`.
    """
    if output.exists():
        raise UserError(f"{output} exists already: choose another --output")
    identity_file = work / "identity.txt"
    if resume and identity_file.is_file():
        if identity_file.read_text() != identity:
            raise UserError(f"{work} has the work of other inputs or options: leave --resume out")
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    identity_file.write_text(identity)


def _identity(pair: Pair, prompts: Sequence[Sequence[int]], options: Adaptation) -> str:
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for c in (pair.target, pair.drafter) for p in c.files()]
    adapters = [str(folder) for folder in pair.adapters]
    numbers = dataclasses.asdict(options)
    del numbers["device"]  # a run may go on elsewhere
    return json.dumps([files, adapters, [list(ids) for ids in prompts], numbers])


def _kept_answers(target: Any, prompts: Sequence[Sequence[int]], answering: Answering, path: Path) -> list[Answer]:
    """Return the target's answer to each prompt; they are kept at `path` for a run that goes on."""
    if path.is_file():
        return [Answer(tuple(ids), start) for ids, start in json.loads(path.read_text())]
    answers = answered(target, prompts, answering)
    write_atomically(path, json.dumps(answers))
    return answers


def _train(
    target: Any,
    drafter: Any,
    answers: Sequence[Answer],
    options: Adaptation,
    path: Path,
    on_step: Callable[[Step], None],
) -> None:
    """Train the drafter; the state of a killed run at `path` goes on."""
    trained = [p for n, p in drafter.named_parameters() if "embed_tokens" not in n and "lm_head" not in n]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    done = 0
    if path.is_file():
        state = torch.load(path, map_location=drafter.device, weights_only=True)
        done = state["done"]
        optimiser.load_state_dict(state["optimiser"])
        for parameter, kept in zip(trained, state["parameters"], strict=True):
            parameter.data.copy_(kept)
    for number in range(done, options.steps):
        # Its own seed for each step, so that a run that goes on draws what it would have drawn.
        generator = torch.Generator().manual_seed(options.seed + number)
        batch = [answers[i] for i in torch.randint(len(answers), (options.batch,), generator=generator).tolist()]
        loss, agreement = round_loss(target, drafter, batch, options.position_offset)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        left = 1 - number / options.steps
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * min(1.0, (number + 1) / _WARM_UP) * left
        optimiser.step()
        optimiser.zero_grad()
        on_step(Step(number + 1, float(loss.detach()), float(agreement)))
        if (number + 1) % options.save_every == 0 or number + 1 == options.steps:
            state = {"done": number + 1, "optimiser": optimiser.state_dict(), "parameters": [p.data for p in trained]}
            with replacing(path) as beside:
                torch.save(state, beside)


def round_loss(target: Any, drafter: Any, batch: Sequence[Answer], position_offset: int) -> tuple[Tensor, Tensor]:
    """Return the loss of rounds that begin at every token of the answers, and the share of right first drafts."""
    total, agreement = torch.zeros((), device=target.device), torch.zeros(())
    for j, (hidden, logits) in enumerate(rounds(target, drafter, batch, position_offset)):
        loss, right = _step_loss(drafter, hidden, logits)
        if j == 0:
            agreement, reached = right.float().mean(), torch.ones_like(loss)
        total = total + STEP_WEIGHTS[j] * step_mean(loss, reached)
        reached = reached * right
    return total, agreement


def _step_loss(drafter: Any, hidden: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each draft with that of its centroids, and which drafts are right.

    Shapes: hidden [N,D], logits [N,V] -> [N], [N] bool
    """
    scores = F.linear(hidden, drafter.lm_head.weight)
    loss, right = draft_loss(scores, logits)
    embedder = drafter.masked_embedding
    if embedder is not None:
        clusters = centroid_targets(embedder.token_ordering, embedder.num_centroids, scores.argmax(-1))
        loss = loss + F.cross_entropy(embedder.centroids(hidden.detach()), clusters, reduction="none")
    return loss, right
