"""A bundle's drafter against the float drafter, on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from mtp_calibration.same_model.float_pair import FloatDrafter, TargetOutputs
from mtp_calibration.same_model.metrics import RelativeError
from mtp_calibration.same_model.observe import Observed, Text, accepted
from mtp_calibration.same_model.quality import DrafterQuality
from mtp_runtime import Session


class DraftComparison:
    """The drafter on the bundle's own rows and activations, so that errors of the target do not count."""

    def __init__(self, drafter: FloatDrafter, session: Session) -> None:
        self.drafter, self.depth = drafter, session.manifest.num_draft_tokens
        self.offset = session.manifest.drafter_position_offset
        self.projected = (RelativeError(), RelativeError())
        self.scores = RelativeError()
        self.same = self.candidates = 0
        self.accepted: list[int] = []
        self.float_same_rounds: list[int] = []
        self.float_accepted: tuple[list[int], list[int]] = ([], [])

    def add(self, text: Text, expected: TargetOutputs, observed: Observed) -> None:
        if not observed.rounds:
            return
        drafter, top_k = self.drafter, self.drafter.spec.head.top_k
        first = text.start
        tokens = text.ids[first:]
        caches = {name: torch.from_numpy(np.ascontiguousarray(rows)) for name, rows in observed.caches.items()}
        states = torch.from_numpy(observed.activations[first - 1 : -1])
        hidden = {}
        for offset in (0, 1):
            hidden[offset], projected = drafter.step(tokens, states, _whole(caches, len(text.ids)), first, offset)
            for one in observed.rounds:
                self.projected[offset].add(projected[one.filled - first].numpy(), one.activations)
        choices = observed.logits.argmax(-1)
        best = int(self.projected[1].value < self.projected[0].value)
        for one in observed.rounds:
            state = hidden[best][one.filled - first]
            candidates = drafter.ordering[drafter.clusters(state[None], top_k)[0]].reshape(-1).numpy()
            self.same += int(np.isin(one.candidates, candidates).sum())
            self.candidates += len(candidates)
            scores = (drafter.embedding[torch.from_numpy(one.candidates).long()] @ state).numpy()
            self.scores.add(scores - scores.mean(), one.scores - one.scores.mean())
            self.accepted.append(accepted(one.drafts, one.filled, text.ids, choices))
        self._count_float(text, expected, {one.filled for one in observed.rounds})

    def _count_float(self, text: Text, expected: TargetOutputs, filled: Collection[int]) -> None:
        """Count the drafts of the float pair after every token of the answer, with either convention."""
        choices, first = expected.logits.argmax(-1), text.start
        for offset in (0, 1):
            tokens, states = list(text.ids[first:]), torch.from_numpy(expected.activations[first - 1 : -1])
            chains: list[list[int]] = []
            for _ in range(self.depth):
                hidden, states = self.drafter.step(tokens, states, expected.caches, first, offset)
                tokens = self.drafter.best(hidden, self.drafter.spec.head.top_k)
                chains.append(tokens)
            for at, drafts in enumerate(zip(*chains, strict=True), first):
                count = accepted(drafts, at, text.ids, choices)
                self.float_accepted[offset].append(count)
                if offset == self.offset and at in filled:
                    self.float_same_rounds.append(count)

    def quality(self) -> DrafterQuality:
        rounds = len(self.accepted)
        differences = np.subtract(*map(np.asarray, self.float_accepted)) if rounds else np.zeros(1)
        return DrafterQuality(
            rounds=rounds,
            error_by_offset=(self.projected[0].value, self.projected[1].value),
            same_candidates=self.same / max(1, self.candidates),
            score_error=self.scores.value,
            accepted_per_round=_mean(self.accepted),
            float_same_rounds=_mean(self.float_same_rounds),
            float_accepted_per_round=(_mean(self.float_accepted[0]), _mean(self.float_accepted[1])),
            float_rounds=len(differences),
            float_difference_error=float(differences.std() / math.sqrt(len(differences))),
            num_draft_tokens=self.depth,
        )


def _whole(caches: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Return caches with the rows that a short pool has dropped as zeros: no window reaches them."""
    return {n: torch.nn.functional.pad(c, (0, 0, length - c.shape[2], 0)) for n, c in caches.items()}


def _mean(counts: Sequence[int]) -> float:
    return float(np.mean(counts)) if counts else 0.0
