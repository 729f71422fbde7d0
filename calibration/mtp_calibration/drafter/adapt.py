"""Adaptation: a drafter learns to say what a fine-tuned target says, on the target's own answers to a user's prompts.

The target is transformers', frozen; the drafter too, at every position of an answer at once, as if a round began there:
four chained steps, each judged by the target's own distribution (Leviathan et al. 2023 say why that is acceptance). The
embedding and the clusters stay; centroids learn to find the dense first choice. What is written has the names, the
dtypes and the config of the drafter that it came from.

Shapes: B texts, T tokens, S rounds of a text, H the target's hidden size, D the drafter's, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.names import canonical_module
from mtp_export.source.pair import Pair
from mtp_runtime.atomic import replacing, write_atomically
from mtp_runtime.errors import UserError

DEPTH = 4  # chained steps of a round
_STEP_WEIGHTS = (1.0, 0.9, 0.8, 0.7)
_HARD = 0.6  # of the loss: cross-entropy with the target's choice; the rest with its distribution
_NOT_REACHED = 0.3  # weight of a step that a round would not have reached
_TEMPERATURE = 0.8
_WARM_UP = 20
_ROWS_AT_ONCE = 8192
_TEXTS, _STATE = "texts.json", "state.pt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptation:
    """How a drafter is adapted. save_every: steps between checkpoints."""

    steps: int
    batch: int
    learning_rate: float
    max_new_tokens: int
    position_offset: int
    seed: int
    save_every: int = 50


class Answer(NamedTuple):
    """Tokens of which the first `start` are a prompt, and the others what the target says after it."""

    ids: tuple[int, ...]
    start: int


class Step(NamedTuple):
    """What a training step gave: the loss, and the share of first drafts that the target would have said."""

    number: int
    loss: float
    agreement: float


def adapt(
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    output: Path,
    options: Adaptation,
    *,
    device: torch.device,
    resume: bool = False,
    on_stage: Callable[[str], None] = lambda name: None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> None:
    """Adapt the pair's drafter and write it to the folder `output`. What a killed run has done lies beside it.

    Raises:
        UserError: the output exists, or there is work of a run with other inputs.
    """
    work = output.with_name(f".{output.name}.adapting")
    _prepare(output, work, _identity(pair, prompts, options), resume=resume)
    target, drafter = load(pair.target.folder, device), load(pair.drafter.folder, device, trained=True)
    merge_adapters(pair, target)
    on_stage("answers of the target")
    answers = _kept_answers(target, prompts, options, pair.stop_token_ids, work / _TEXTS)
    on_stage("adapting")
    _train(target, drafter, answers, options, work / _STATE, on_step)
    folder = work / "drafter"
    shutil.rmtree(folder, ignore_errors=True)
    save_like(pair.drafter, drafter, folder)
    os.replace(folder, output)
    shutil.rmtree(work)


def _prepare(output: Path, work: Path, identity: str, *, resume: bool) -> None:
    """Make the folder that work is kept in, or find it.

    Raises:
        UserError: see `adapt`.
    """
    if output.exists():
        raise UserError(f"{output} exists already: choose another --output")
    told = work / "identity.txt"
    if resume and told.is_file():
        if told.read_text() != identity:
            raise UserError(f"{work} has the work of other inputs or options: leave --resume out")
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    told.write_text(identity)


def _identity(pair: Pair, prompts: Sequence[Sequence[int]], options: Adaptation) -> str:
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for c in (pair.target, pair.drafter) for p in c.files()]
    adapters = [str(folder) for folder in pair.adapters]
    return json.dumps([files, adapters, [list(ids) for ids in prompts], dataclasses.asdict(options)])


def load(folder: Path, device: torch.device, *, trained: bool = False) -> Any:
    """A model of transformers from local files; the target in bfloat16 where there is a GPU."""
    library: Any = transformers  # only half of what is used here is typed
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" and not trained else torch.float32
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).train(False).requires_grad_(False)


def merge_adapters(pair: Pair, target: Any) -> None:
    """Give the target, a model of transformers, the values that adapters make of its own."""
    checkpoint = pair.target
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    if head.weight is embedding.weight and not checkpoint.tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for stored, tensor in itertools.chain(target.named_parameters(), target.named_buffers()):
        name = canonical_module(stored)
        name = checkpoint.embedding if tensor is embedding.weight else name
        if name in checkpoint.adapted:
            for start in range(0, len(tensor), _ROWS_AT_ONCE):
                rows = torch.from_numpy(checkpoint.rows(name, start, start + _ROWS_AT_ONCE))
                tensor.data[start : start + len(rows)] = rows.to(tensor)


def _kept_answers(
    target: Any, prompts: Sequence[Sequence[int]], options: Adaptation, stops: Sequence[int], path: Path
) -> list[Answer]:
    """What the target says after each prompt; kept for a run that goes on."""
    if path.is_file():
        return [Answer(tuple(ids), start) for ids, start in json.loads(path.read_text())]
    answers = answered(
        target, prompts, stops, max_new_tokens=options.max_new_tokens, batch=options.batch, seed=options.seed
    )
    write_atomically(path, json.dumps(answers))
    return answers


def answered(
    target: Any,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    *,
    max_new_tokens: int,
    batch: int,
    seed: int,
    drawn_every: int = 4,
) -> list[Answer]:
    """What the target says after each prompt; one of so many answers is drawn, the others are greedy.

    Raises:
        UserError: every answer is shorter than a round.
    """
    torch.manual_seed(seed)
    found: dict[int, Answer] = {}
    lengths: dict[tuple[int, bool], list[int]] = {}
    for number, ids in enumerate(prompts):
        lengths.setdefault((len(ids), number % drawn_every == drawn_every - 1), []).append(number)
    for (length, drawn), numbers in lengths.items():  # prompts of one length need no padding
        how = {"do_sample": True, "temperature": _TEMPERATURE, "top_k": 0} if drawn else {"do_sample": False}
        for at in range(0, len(numbers), batch):
            some = numbers[at : at + batch]
            asked = torch.tensor([prompts[n] for n in some], device=target.device)
            said = target.generate(
                asked,
                attention_mask=torch.ones_like(asked),
                max_new_tokens=max_new_tokens,
                eos_token_id=list(stops),
                pad_token_id=0,
                **how,
            )
            for number, row in zip(some, said.tolist(), strict=True):
                end = next((i + 1 for i in range(length, len(row)) if row[i] in stops), len(row))
                found[number] = Answer(tuple(row[:end]), length)
    answers = [found[number] for number in range(len(prompts)) if len(found[number].ids) > found[number].start + DEPTH]
    if not answers:
        raise UserError(f"the target says no more than {DEPTH} tokens after any prompt: give others")
    return answers


def _train(
    target: Any,
    drafter: Any,
    answers: Sequence[Answer],
    options: Adaptation,
    path: Path,
    on_step: Callable[[Step], None],
) -> None:
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
    """The loss of rounds that begin at every token of the answers, and how often a first draft is the target's own."""
    total, agreement = torch.zeros((), device=target.device), torch.zeros(())
    for j, (hidden, wanted) in enumerate(rounds(target, drafter, batch, position_offset)):
        loss, right = _step_loss(drafter, hidden, wanted)
        if j == 0:
            agreement, reached = right.float().mean(), torch.ones_like(loss)
        total = total + _STEP_WEIGHTS[j] * (loss * (_NOT_REACHED + (1 - _NOT_REACHED) * reached)).mean()
        reached = reached * right
    return total, agreement


def rounds(target: Any, drafter: Any, batch: Sequence[Answer], position_offset: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What each step of the rounds that begin at every token of the answers gives the head, and the target's logits.

    The round after t processed tokens is fed token t + j in step j = 0, 1, …, and judged by what the target says there.

    Shapes: -> [N,D], [N,V]
    """
    length = max(len(answer.ids) for answer in batch)
    ids = torch.tensor([[*a.ids, *[0] * (length - len(a.ids))] for a in batch], device=target.device)
    count = length - DEPTH
    at = torch.arange(count, device=ids.device) + 1  # tokens processed when the round begins
    starts = torch.tensor([a.start for a in batch], device=ids.device)[:, None]
    ends = torch.tensor([len(a.ids) for a in batch], device=ids.device)[:, None]
    inside = (at >= starts) & (at + DEPTH <= ends)
    with torch.no_grad():
        said = target(ids, use_cache=False, output_hidden_states=True, return_shared_kv_states=True)
        embedded = target.get_input_embeddings()(ids).float()
        state = said.hidden_states[-1][:, :count].float()
        shared = {kind: tuple(x[:, :, :count].float() for x in kv) for kind, kv in said.shared_kv_states.items()}
    masks = round_masks(count, drafter.config.get_text_config().sliding_window, ids.device)
    for j in range(1, DEPTH + 1):
        now = embedded[:, j : j + count]
        hidden, state = draft_step(drafter, now, state, shared, masks, at - 1 + position_offset)
        yield hidden[inside], said.logits[:, j : j + count][inside].float()


def round_masks(count: int, window: int, device: torch.device) -> dict[str, Tensor]:
    """What the round after each token sees of the tokens: all up to it, or so many and one more. Shapes: [1,1,S,S]"""
    rows, columns = (torch.arange(count, device=device)[shape] for shape in ((slice(None), None), (None,)))
    full = columns <= rows
    return {
        "full_attention": full[None, None],
        "sliding_attention": (full & (columns >= rows - window))[None, None],
    }


def draft_step(
    drafter: Any,
    embedded: Tensor,
    state: Tensor,
    shared: Mapping[str, tuple[Tensor, ...]],
    masks: Mapping[str, Tensor],
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of every round. Shapes: embedded and state [B,S,H], positions [S] -> hidden [B,S,D], state [B,S,H]"""
    hidden = drafter.model(
        inputs_embeds=drafter.pre_projection(torch.cat([embedded, state], -1)),
        attention_mask=dict(masks),
        position_ids=positions[None],
        shared_kv_states=dict(shared),
        use_cache=False,
    ).last_hidden_state
    return hidden, drafter.post_projection(hidden)


def _step_loss(drafter: Any, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each draft with that of its centroids, and where the draft is right.

    Shapes: hidden [N,D], wanted [N,V] -> [N], [N]
    """
    log_q = F.linear(hidden, drafter.lm_head.weight).log_softmax(-1)
    choices, first = wanted.argmax(-1), log_q.argmax(-1)
    hard = F.nll_loss(log_q, choices, reduction="none")
    soft = -(wanted.softmax(-1) * log_q).sum(-1)
    loss = _HARD * hard + (1 - _HARD) * soft
    embedder = drafter.masked_embedding
    if embedder is not None:
        size = embedder.token_ordering.numel() // embedder.num_centroids
        place = torch.empty_like(embedder.token_ordering)
        place[embedder.token_ordering] = torch.arange(len(place), device=place.device)
        loss = loss + F.cross_entropy(embedder.centroids(hidden.detach()), place[first] // size, reduction="none")
    return loss, (first == choices).detach()


def save_like(checkpoint: Checkpoint, model: Any, folder: Path) -> None:
    """Write a model's weights under the names and in the dtypes that a checkpoint of it has, with its other files."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    folder.mkdir()
    for path in checkpoint.files():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
            continue
        with safe_open(path, framework="pt") as stored:
            dtypes = {name: stored.get_tensor(name).dtype for name in stored.keys()}  # noqa: SIM118  # no mapping
            tensors = {name: found[name].data.to("cpu", dtype).contiguous() for name, dtype in dtypes.items()}
            save_file(tensors, folder / path.name, metadata=stored.metadata())
