"""Which drafts of a round are kept: pure functions of the drafts and of the target's choices.

Notation: the target's verify pass sees the pending token and K drafts, so its row i judges draft i (from 0) and its
row K has seen every draft. Whatever the drafter proposed, the committed tokens are those of the target alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Where a committed token came from: a pass over one token, an agreed draft, the target's own token at the first
# rejection, or the extra token when every draft was accepted.
Origin = Literal["plain", "accepted", "correction", "bonus"]


class Acceptance(NamedTuple):
    """The outcome of a round: the leading `accepted` drafts are kept, then `next_token` follows."""

    accepted: int
    next_token: int
    origin: Origin


def accept_each(drafts: Sequence[int], token_at: Callable[[int], int]) -> Acceptance:
    """Keep the leading drafts that `token_at` confirms by returning them, in order.

    `token_at(i)` chooses the token at row i. It is called only when every draft before that row is kept; for the row
    after the last draft it chooses the bonus.
    """
    for row, draft in enumerate(drafts):
        token = token_at(row)
        if token != draft:
            return Acceptance(row, token, "correction")
    return Acceptance(len(drafts), token_at(len(drafts)), "bonus" if drafts else "plain")


def accept_greedy(drafts: Sequence[int], choices: Sequence[int]) -> Acceptance:
    """Keep the longest prefix of `drafts` that greedy decoding of the target would have produced.

    `choices` holds the target's choice at each row of the verify pass, at least one more than there are drafts
    (rows of padding beyond are ignored). Source: Leviathan et al. 2023 (arXiv 2211.17192), at temperature 0.

    Raises:
        ValueError: there are too few choices.
    """
    if len(choices) <= len(drafts):
        raise ValueError(f"{len(drafts)} drafts need {len(drafts) + 1} choices, got {len(choices)}")
    return accept_each(drafts, lambda row: choices[row])


def top_margin(logits: NDArray[np.float32]) -> float:
    """Return the highest logit minus the second highest: how far a choice is from a tie.

    Where only one token is allowed, the others -inf, it is the largest float32: JSON knows no infinity.

    Shapes: logits [V], V > 1.
    """
    first, second = np.partition(logits, -2)[-1:-3:-1]
    return min(float(first - second), float(np.finfo(np.float32).max))
