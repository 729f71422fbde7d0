"""The clustered head on real states of the drafter: what is lost by scoring few clusters, how many are enough, and the
position convention that the drafter was trained with.

A round is taken to begin after every token of an answer. Shapes: N states, D the drafter's hidden size, C clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from mtp_calibration.same_model.float_pair import FloatDrafter, FloatTarget, lookup_name
from mtp_calibration.same_model.observe import Text, accepted
from mtp_export.source.pair import Pair

_DEPTH = 4  # chained steps of a round
_ENOUGH = 0.995  # of the accepted drafts that all clusters would give
_DEVIATIONS = 3.0  # standard errors by which a position convention must be better to be chosen


class TopKRow(msgspec.Struct, frozen=True, kw_only=True):
    """The effect of scoring `top_k` clusters.

    scored: share of the vocabulary; recall: states whose dense first choice is among the candidates; target_recall:
    states whose candidates hold the target's choice; accepted_per_round: accepted drafts of a round.
    """

    top_k: int
    scored: float
    recall: float
    target_recall: float
    accepted_per_round: float


class PositionTest(msgspec.Struct, frozen=True, kw_only=True):
    """Accepted drafts of a round by convention, L - 1 and L, the standard error of their difference, and the choice."""

    accepted_per_round: tuple[float, float]
    difference_error: float
    chosen: int


def float_answers(pair: Pair, prompts: Sequence[Sequence[int]], count: int) -> list[Text]:
    """Return prompts with the float target's greedy answers of `count` tokens, made in rounds over all of them."""
    target = FloatTarget(pair, max(len(ids) for ids in prompts) + count)
    drafter = FloatDrafter(pair, target.length, target.values[lookup_name("embedder")])
    texts, settled = [list(ids) for ids in prompts], [len(ids) for ids in prompts]
    ends = [len(ids) + count for ids in prompts]
    while open_ := [i for i, end in enumerate(ends) if settled[i] < end]:
        for i, outputs in zip(open_, target.outputs([texts[i] for i in open_]), strict=True):
            choices, ids = outputs.logits.argmax(-1), texts[i]
            while settled[i] < len(ids) and ids[settled[i]] == choices[settled[i] - 1]:
                settled[i] += 1
            filled = settled[i]
            ids[filled:] = [int(choices[filled - 1])]
            settled[i] += 1
            state = torch.from_numpy(outputs.activations[filled - 1 : filled])
            for _ in range(min(_DEPTH, ends[i] - settled[i])):
                hidden, state = drafter.step(ids[-1:], state, outputs.caches, filled, 1)
                ids += drafter.best(hidden, pair.drafter_spec.head.top_k)
    return [
        Text(str(i), "", tuple(ids[:end]), len(prompts[i]))
        for i, (ids, end) in enumerate(zip(texts, ends, strict=True))
    ]


class Rounds:
    """The outputs of target and drafter on some texts, from which heads and positions are judged."""

    def __init__(self, pair: Pair, texts: Sequence[Text]) -> None:
        """Run the float target once over the texts; rounds begin in their answers."""
        self.texts = [text.ids for text in texts]
        self._first = [text.start for text in texts]
        target = FloatTarget(pair, max(len(ids) for ids in self.texts))
        self.drafter = FloatDrafter(pair, target.length, target.values[lookup_name("embedder")])
        read = self.drafter.read
        self._outputs = [
            (outputs.logits.argmax(-1), torch.from_numpy(outputs.activations), {n: outputs.caches[n] for n in read})
            for outputs in target.outputs(self.texts)
        ]

    @torch.no_grad()
    def accepted(self, top_k: int, offset: int) -> list[int]:
        """Return the accepted drafts of the round after each token of each text."""
        counts = []
        for ids, first, (choices, states, caches) in zip(self.texts, self._first, self._outputs, strict=True):
            tokens, following, chains = list(ids[first:]), states[first - 1 : -1], []
            for _ in range(_DEPTH):
                hidden, following = self.drafter.step(tokens, following, caches, first, offset)
                tokens = self.drafter.best(hidden, top_k)
                chains.append(tokens)
            drafts = zip(*chains, strict=True)
            counts += [accepted(one, at, ids, choices) for at, one in enumerate(drafts, first)]
        return counts

    @torch.no_grad()
    def states(self, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the head's inputs in chained steps along the texts, with the dense first choice and the target's.

        Shapes: -> [N,D], [N], [N]
        """
        hidden, targets = [], []
        for ids, first, (choices, states, caches) in zip(self.texts, self._first, self._outputs, strict=True):
            following = states[first - 1 : -1]
            for step in range(_DEPTH):
                # Along the text: later steps are fed the drafts of a drafter that is right.
                shifted = [*ids[first + step :], *([ids[-1]] * step)][: len(ids) - first]
                states_here, following = self.drafter.step(shifted, following, caches, first, offset)
                kept = max(0, len(ids) - first - step)
                hidden.append(states_here[:kept])
                targets.append(torch.from_numpy(np.asarray(choices[first + step :])))
        joined = torch.cat(hidden)
        best = torch.cat([(block @ self.drafter.embedding.T).argmax(-1) for block in torch.split(joined, 256)])
        return joined, best, torch.cat(targets)


def top_k_curve(rounds: Rounds, offset: int, top_ks: Sequence[int]) -> list[TopKRow]:
    """Return the effect of each number of clusters, on the drafter's own centroids."""
    drafter = rounds.drafter
    hidden, best, targets = rounds.states(offset)
    ranks, target_ranks = (_ranks(drafter, hidden, tokens) for tokens in (best, targets))
    return [
        TopKRow(
            top_k=k,
            scored=k / len(drafter.centroids),
            recall=float((ranks < k).float().mean()),
            target_recall=float((target_ranks < k).float().mean()),
            accepted_per_round=float(np.mean(rounds.accepted(k, offset))),
        )
        for k in top_ks
    ]


def _ranks(drafter: FloatDrafter, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return at which place the cluster of each state's token comes. Shapes: hidden [N,D], tokens [N] -> [N]"""
    scores = hidden @ drafter.centroids.T
    own = scores.gather(1, drafter.cluster_of_token[tokens][:, None])
    return (scores > own).sum(-1)


def top_ks(clusters: int) -> list[int]:
    """Return numbers of clusters to try: a few to each doubling, all of them last."""
    tried = {round(clusters * 2 ** (-i / 2)) for i in range(2 * int(math.log2(clusters)) + 1)}
    return sorted(k for k in tried if k >= 1)


def enough(curve: Sequence[TopKRow]) -> int:
    """Return the fewest clusters that keep almost all drafts that scoring every cluster would give."""
    most = curve[-1].accepted_per_round
    return next(row.top_k for row in curve if row.accepted_per_round >= _ENOUGH * most)


def position_test(rounds: Rounds, default: int) -> PositionTest:
    """Return which convention accepts more drafts; `default` unless the other one is clearly better."""
    top_k = rounds.drafter.spec.head.top_k
    counts = [np.asarray(rounds.accepted(top_k, offset)) for offset in (0, 1)]
    difference = counts[1] - counts[0]
    error = float(difference.std() / math.sqrt(len(difference)))
    clear = abs(float(difference.mean())) > _DEVIATIONS * error
    return PositionTest(
        accepted_per_round=(float(counts[0].mean()), float(counts[1].mean())),
        difference_error=error,
        chosen=int(difference.mean() > 0) if clear else default,
    )
