"""What a bundle says of a text: every logit, every cache row, and the drafts at many positions. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtp_export.check.prompts import Prompt, text_of
from mtp_runtime import Session


class Round(NamedTuple):
    """Drafts after `filled` processed tokens of a text, chained, and what the first step said.

    Shapes: drafts K, candidates [N], scores [N], activations [H].
    """

    filled: int
    drafts: tuple[int, ...]
    candidates: NDArray[np.int32]
    scores: NDArray[np.float32]
    activations: NDArray[np.float32]


class Observed(NamedTuple):
    """Shapes: logits [T,V], activations [T,H], caches by name [1,G,T,D]."""

    logits: NDArray[np.float32]
    activations: NDArray[np.float32]
    caches: dict[str, NDArray[np.float32]]
    rounds: tuple[Round, ...]


class Text(NamedTuple):
    """Tokens of which the first `start` are a prompt, and the others what the bundle says after it."""

    name: str
    kind: str
    ids: tuple[int, ...]
    start: int


def continued(session: Session, prompt: Prompt, *, max_tokens: int, max_new_tokens: int) -> Text:
    """A prompt, its beginning cut off if there are more tokens than `max_tokens` with the answer, and the bundle's
    greedy answer."""
    first, *ids = session.tokenize(text_of(session, prompt))
    ids = [first, *ids[max(0, len(ids) - (max_tokens - max_new_tokens - 1)) :]]
    generation = session.generate(ids, max_new_tokens=max_new_tokens)
    return Text(prompt.id, prompt.kind, (*ids, *generation.finish().tokens), len(ids))


def observe(session: Session, text: Text) -> Observed:
    """Run the text through verify passes, and the drafter between them wherever it has an answer to continue."""
    backend, manifest = session.backend, session.manifest
    size = manifest.num_draft_tokens + 1
    cache = backend.kv_cache
    cache.rewind(0)
    logits, activations, rounds = [], [], []
    for at in range(0, len(text.ids), size):
        said = backend.verify(text.ids[at : at + size])
        filled = min(at + size, len(text.ids))
        cache.advance(filled - at)
        logits.append(said.logits)
        activations.append(said.activations)
        if text.start <= filled < len(text.ids):
            rounds.append(_draft(session, text.ids[filled], said.activations[-1], filled))
    caches = {name: cache.rows(name) for name in cache.names}
    return Observed(np.concatenate(logits), np.concatenate(activations), caches, tuple(rounds))


def _draft(session: Session, pending: int, activations: NDArray[np.float32], filled: int) -> Round:
    token, drafts = pending, []
    first = None
    for _ in range(session.manifest.num_draft_tokens):
        draft = session.backend.draft(token, activations, with_candidates=first is None)
        first = first or draft
        token, activations = draft.best, draft.activations
        drafts.append(token)
    assert first is not None
    assert first.candidates is not None
    assert first.scores is not None
    return Round(filled, tuple(drafts), first.candidates, first.scores, first.activations)


def accepted(drafts: Sequence[int], filled: int, ids: Sequence[int], choices: Sequence[int]) -> int:
    """How many leading drafts after `filled` tokens a target keeps whose choice after token i is `choices[i]`.

    The draft at position j is judged only where the text goes on with the drafts before it.
    """
    count = 0
    for at, draft in enumerate(drafts, filled):
        if at >= len(ids) or draft != choices[at]:
            break
        count += 1
        if at + 1 >= len(ids) or draft != ids[at + 1]:
            break
    return count
