"""Rounds of the drafter that begin at every token of the target's answers at once, on transformers' models.

Shapes: B texts, T tokens, S rounds of a text, N rounds of all texts, H the target's hidden size, D the drafter's, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtp_calibration.drafter.answers import Answer
from mtp_calibration.drafter.loss import DEPTH


def rounds(target: Any, drafter: Any, batch: Sequence[Answer], position_offset: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each step of the rounds that begin at every token of the answers, the head's inputs and the target's
    logits.

    The round after t processed tokens is fed token t + j in step j = 0, 1, …, and judged by the target's logits there.

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
        outputs = target(ids, use_cache=False, output_hidden_states=True, return_shared_kv_states=True)
        embedded = target.get_input_embeddings()(ids).float()
        state = outputs.hidden_states[-1][:, :count].float()
        shared = {kind: tuple(x[:, :, :count].float() for x in kv) for kind, kv in outputs.shared_kv_states.items()}
    masks = round_masks(count, drafter.config.get_text_config().sliding_window, ids.device)
    for j in range(1, DEPTH + 1):
        now = embedded[:, j : j + count]
        hidden, state = draft_step(drafter, now, state, shared, masks, at - 1 + position_offset)
        yield hidden[inside], outputs.logits[:, j : j + count][inside].float()


def round_masks(count: int, window: int, device: torch.device) -> dict[str, Tensor]:
    """Return which tokens the round after each token sees, by kind of layer: all up to it, or `window` and one more.

    Shapes: -> [1,1,S,S] each
    """
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
    """Return the head's inputs and the next state of one step of every round.

    Shapes: embedded and state [B,S,H], positions [S] -> hidden [B,S,D], state [B,S,H]
    """
    hidden = drafter.model(
        inputs_embeds=drafter.pre_projection(torch.cat([embedded, state], -1)),
        attention_mask=dict(masks),
        position_ids=positions[None],
        shared_kv_states=dict(shared),
        use_cache=False,
    ).last_hidden_state
    return hidden, drafter.post_projection(hidden)
