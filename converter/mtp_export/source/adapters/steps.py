"""What an adapter does to a tensor of the model, on blocks of its rows.

A matrix W becomes W + s · B @ A (LoRA, Hu et al. 2021), with s = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski
2023). DoRA (Liu et al. 2024) then gives each row of a projection, and each column of an embedding, a length of its own.
All as PEFT merges them, in float32.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Float32 = NDArray[np.float32]
Where = slice | NDArray[np.int64]  # rows of a tensor: a block, or some in any order
_BLOCK_BYTES = 4 << 20


class Step(Protocol):
    """One change to a tensor."""

    def applied(self, rows: Float32, where: Where) -> Float32:
        """Return the changed rows; `rows` are not written to. Shapes: rows [N, …] -> [N, …]"""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
    """LoRA: scale · b @ a is added. Shapes: a [r,C], b [R,r]"""

    a: Tensor
    b: Tensor
    scale: float

    def applied(self, rows: Float32, where: Where) -> Float32:
        added: Float32 = (self.scale * (_rows(self.b, where) @ self.a.float())).numpy()
        return rows + added


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLengths:
    """DoRA of a projection: after LoRA each row gets its length. Shapes: lengths [R]"""

    low_rank: LowRank
    lengths: Tensor

    def applied(self, rows: Float32, where: Where) -> Float32:
        merged = self.low_rank.applied(rows, where)
        with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros has no direction: told as not finite
            factors = _rows(self.lengths, where).numpy() / np.linalg.norm(merged, axis=1)
            changed: Float32 = factors[:, None] * merged
        return changed


class ColumnLengths:
    """DoRA of an embedding: after LoRA each column gets its length, for which all rows are read once, when the first
    are asked for. Shapes: lengths [C]"""

    def __init__(self, low_rank: LowRank, lengths: Tensor, rows: int, below: Callable[[Where], Float32]) -> None:
        """Change a matrix of `rows` rows, whose rows before this change `below` returns."""
        self._low_rank, self._lengths, self._rows, self._below = low_rank, lengths, rows, below
        self._lock = threading.Lock()
        self._factors: Float32 | None = None

    def applied(self, rows: Float32, where: Where) -> Float32:
        with self._lock:
            if self._factors is None:
                self._factors = self._read_factors()
        return self._factors * self._low_rank.applied(rows, where)

    def _read_factors(self) -> Float32:
        columns = self._lengths.shape[0]
        squares = np.zeros(columns, np.float64)
        step = max(1, _BLOCK_BYTES // (4 * columns))
        for start in range(0, self._rows, step):
            block = slice(start, min(start + step, self._rows))
            squares += np.square(self._low_rank.applied(self._below(block), block), dtype=np.float64).sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self._lengths.float().numpy() / np.sqrt(squares)).astype(np.float32)


class TokenRows:
    """Rows of an embedding that were trained whole take the place of the old ones."""

    def __init__(self, tokens: Sequence[int], values: Tensor, rows: int) -> None:
        """Shapes: tokens [N], below `rows`; values [N,C]"""
        self._values: Float32 = values.float().numpy()
        self._places = np.full(rows, -1, np.int64)
        self._places[list(tokens)] = np.arange(len(tokens))

    def applied(self, rows: Float32, where: Where) -> Float32:
        places = self._places[where]
        trained = places >= 0
        changed = rows.copy()
        changed[trained] = self._values[places[trained]]
        return changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """A tensor: where its first values come from, and the changes in their order.

    origin: the name of a tensor of the checkpoint, or values that an adapter brings in its place.
    """

    origin: str | Tensor
    steps: tuple[Step, ...] = ()

    def then(self, step: Step) -> Chain:
        return dataclasses.replace(self, steps=(*self.steps, step))

    def rows(self, where: Where, stored: Callable[[str, Where], Float32]) -> Float32:
        """Return rows of the changed tensor; `stored` returns those of the checkpoint. Shapes: -> [N, …]"""
        rows = stored(self.origin, where) if isinstance(self.origin, str) else _rows(self.origin, where).numpy()
        for step in self.steps:
            rows = step.applied(rows, where)
        return rows


def _rows(tensor: Tensor, where: Where) -> Tensor:
    """Shapes: tensor [R, …] -> [N, …], float32"""
    return tensor[where if isinstance(where, slice) else torch.from_numpy(where)].float()
