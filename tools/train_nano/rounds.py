"""Rounds on texts that the target wrote: which drafts it would accept, judged at every position at once.

Greedy output does not depend on the drafter. So the target writes its text once; then every position is judged as
the beginning of a round, with the keys of that position and before only, and the rounds are walked: this is the
sequential loop with a properly rewound KV cache, computed in parallel. The clustered head is used as exported.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tools.train_nano.model import Drafter, LanguageModel

MAX_DRAFTS = 6
GRAM, MOST_REPEATED = 4, 0.2  # a text loops where more than this share of its 4-grams were in it before
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A text: where generation began and ended, and how many drafts each of its positions would get right."""

    ids: list[int]
    begin: int
    end: int
    matches: Tensor  # [T], 0..MAX_DRAFTS
    in_candidates: Tensor  # [steps, T], the dense argmax is a candidate


@torch.inference_mode()
def draw(target: LanguageModel, drafter: Drafter, texts: Sequence[list[int]], begins: Sequence[int]) -> list[Drawn]:
    """Draft from every position of texts of any lengths."""
    drawn = []
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        width = max(len(texts[i]) for i in chosen)
        ids = torch.tensor([texts[i] + [0] * (width - len(texts[i])) for i in chosen])
        hidden, shared = target(ids)
        embedded, state = target.embed(ids), hidden
        alive = torch.ones_like(ids, dtype=torch.bool)
        matches = torch.zeros_like(ids)
        candidates = []
        for j in range(1, MAX_DRAFTS + 1):
            x, state = drafter(torch.roll(embedded, -j, 1), state, shared)
            clustered = drafter.clustered_logits(x)
            alive &= clustered.argmax(-1) == torch.roll(ids, -j - 1, 1)
            matches += alive
            best = drafter.logits(x).argmax(-1, keepdim=True)
            candidates.append(clustered.gather(-1, best)[..., 0].isfinite())
        inside = torch.stack(candidates)
        drawn += [
            Drawn(ids=texts[i], begin=begins[i], end=len(texts[i]), matches=matches[row], in_candidates=inside[:, row])
            for row, i in enumerate(chosen)
        ]
    return drawn


def before_it_loops(drawn: Drawn) -> Drawn:
    """Return the longest beginning of the text in which at most `MOST_REPEATED` of the 4-grams were there before."""
    seen: set[tuple[int, ...]] = set()
    repeated, end = 0, drawn.begin
    for last in range(drawn.begin, drawn.end):
        first = last - GRAM + 1
        if first >= drawn.begin:
            gram = tuple(drawn.ids[first : last + 1])
            repeated += gram in seen
            seen.add(gram)
        if repeated <= MOST_REPEATED * max(1, first - drawn.begin + 1):
            end = last + 1
    return replace(drawn, end=end)


def walk(texts: Sequence[Drawn], drafts: int) -> tuple[float, list[float]]:
    """Return the committed tokens per round, and for each draft position the share of rounds that accepted it.

    Prefill commits the first token. A round at t knows token t + 1, drafts what follows and commits the accepted
    drafts and one token of the target.
    """
    rounds = committed = 0
    accepted = [0] * drafts
    for text in texts:
        t = text.begin - 1
        while t + 2 < text.end:
            count = min(int(text.matches[t]), drafts, text.end - t - 2)
            for j in range(count):
                accepted[j] += 1
            step = min(count + 1, text.end - t - 2)
            rounds, committed, t = rounds + 1, committed + step, t + step
    return committed / max(1, rounds), [a / max(1, rounds) for a in accepted]


def recall(texts: Sequence[Drawn], drafts: int = 4) -> float:
    """Return the share of draft steps in the generated part whose dense argmax is among the candidates."""
    parts = [text.in_candidates[:drafts, text.begin - 1 : max(text.begin, text.end - drafts - 1)] for text in texts]
    return float(torch.cat([part.flatten() for part in parts]).float().mean())


def acceptance_rows(name: str, texts: Sequence[Drawn]) -> list[str]:
    """Return table rows for K = 1..MAX_DRAFTS."""
    rows = []
    for drafts in range(1, MAX_DRAFTS + 1):
        committed, accepted = walk(texts, drafts)
        shares = " ".join(f"{100 * a:.0f}" for a in accepted)
        rows.append(f"| {name} | {drafts} | {committed:.2f} | {shares} |")
    return rows
