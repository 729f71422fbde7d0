"""Distances between a float model's and a quantised model's outputs for the same tokens. Numpy only.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from mtp_runtime.generate.acceptance import top_margin

FloatArray = NDArray[np.float32]
_ROWS = 32  # at a time in float64: a row of a large vocabulary takes 2 MB


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """Where a greedy answer first is not the float model's choice: the token's number, and by how many logits the
    float model prefers its own. None of both where it never differs."""

    text: str
    tokens: int
    first: int | None
    margin: float | None


class Agreement(msgspec.Struct, kw_only=True):
    """Sums over texts; the properties are what is reported."""

    tokens: int = 0
    kl: float = 0.0
    same: int = 0
    scored: int = 0
    float_nll: float = 0.0
    nll: float = 0.0

    @property
    def kl_per_token(self) -> float:
        """Mean over positions of KL(float || quantised), in nats."""
        return self.kl / max(1, self.tokens)

    @property
    def top1(self) -> float:
        """Share of positions with the same first choice."""
        return self.same / max(1, self.tokens)

    @property
    def float_perplexity(self) -> float:
        """Perplexity of the float model."""
        return float(np.exp(self.float_nll / max(1, self.scored)))

    @property
    def perplexity(self) -> float:
        """Perplexity of the quantised model."""
        return float(np.exp(self.nll / max(1, self.scored)))

    def add(self, reference: FloatArray, result: FloatArray, ids: Sequence[int], start: int) -> None:
        """Count a text. Perplexity is that of the first `start` tokens, which no model wrote.

        Shapes: reference and result [T,V], ids T
        """
        self.same += int((reference.argmax(-1) == result.argmax(-1)).sum())
        self.tokens += len(reference)
        self.scored += max(0, start - 1)
        for at in range(0, len(reference), _ROWS):
            p, q = log_softmax(reference[at : at + _ROWS]), log_softmax(result[at : at + _ROWS])
            self.kl += float((np.exp(p) * (p - q)).sum())
            following = np.asarray(ids[at + 1 : min(start, at + 1 + _ROWS)], np.int64)
            rows = np.arange(len(following))
            self.float_nll -= float(p[rows, following].sum())
            self.nll -= float(q[rows, following].sum())


def log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    """Return the logarithms of softmax. Shapes: [T,V] -> [T,V]"""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log_p: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_p


def divergence(name: str, reference: FloatArray, ids: Sequence[int], start: int) -> Divergence:
    """Hold a greedy answer, the tokens from `start`, against the float model's choices along it.

    Up to the first difference they are the choices of the float model alone.

    Shapes: reference [T,V], ids T
    """
    for number, token in enumerate(ids[start:]):
        row = reference[start - 1 + number]
        if int(row.argmax()) != token:
            return Divergence(text=name, tokens=len(ids) - start, first=number, margin=top_margin(row))
    return Divergence(text=name, tokens=len(ids) - start, first=None, margin=None)


class RelativeError(msgspec.Struct, kw_only=True):
    """Root mean square of a difference, relative to the reference's."""

    squares: float = 0.0
    difference: float = 0.0

    def add(self, reference: NDArray[np.float32], result: NDArray[np.float32]) -> None:
        """Add the difference of two arrays. Shapes: any, both alike."""
        self.squares += float(np.square(reference, dtype=np.float64).sum())
        self.difference += float(np.square(reference.astype(np.float64) - result).sum())

    @property
    def value(self) -> float:
        """The relative error; 0 where nothing was added."""
        return float(np.sqrt(self.difference / self.squares)) if self.squares else 0.0
