"""The target's own answers to prompts: what a drafter learns from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch

from mtp_calibration.drafter.loss import DEPTH
from mtp_runtime.errors import UserError

_TEMPERATURE = 0.8


class Answer(NamedTuple):
    """Tokens of which the first `start` are a prompt, and the others the target's answer."""

    ids: tuple[int, ...]
    start: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answering:
    """How the target answers: one in `drawn_every` answers is drawn, the others are greedy.

    batch: prompts of one length that are answered at once.
    """

    stop_token_ids: Collection[int]
    max_new_tokens: int
    batch: int
    seed: int
    drawn_every: int = 4


def answered(target: Any, prompts: Sequence[Sequence[int]], options: Answering) -> list[Answer]:
    """Return the target's answer to each prompt, without those that are shorter than a round.

    Raises:
        UserError: every answer is shorter than a round.
    """
    torch.manual_seed(options.seed)
    answers: dict[int, Answer] = {}
    lengths: dict[tuple[int, bool], list[int]] = {}
    for number, ids in enumerate(prompts):
        drawn = number % options.drawn_every == options.drawn_every - 1
        lengths.setdefault((len(ids), drawn), []).append(number)
    for (length, drawn), numbers in lengths.items():  # prompts of one length need no padding
        for at in range(0, len(numbers), options.batch):
            some = numbers[at : at + options.batch]
            for number, row in zip(some, _continued(target, [prompts[n] for n in some], options, drawn), strict=True):
                end = next((i + 1 for i in range(length, len(row)) if row[i] in options.stop_token_ids), len(row))
                answers[number] = Answer(tuple(row[:end]), length)
    in_order = [answers[number] for number in range(len(prompts))]
    long_enough = [answer for answer in in_order if len(answer.ids) > answer.start + DEPTH]
    if not long_enough:
        raise UserError(f"no answer of the target has more than {DEPTH} tokens: give other prompts")
    return long_enough


def _continued(target: Any, prompts: Sequence[Sequence[int]], options: Answering, drawn: bool) -> list[list[int]]:
    """Return prompts of one length with the tokens that the target continues them with."""
    ids = torch.tensor(prompts, device=target.device)
    choice = {"do_sample": True, "temperature": _TEMPERATURE, "top_k": 0} if drawn else {"do_sample": False}
    rows: list[list[int]] = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=options.max_new_tokens,
        eos_token_id=list(options.stop_token_ids),
        pad_token_id=0,
        **choice,
    ).tolist()
    return rows
