"""The KV cache: allocated once, shared by target and drafter, rewound by moving one number.

The target writes the rows of the tokens it processes at their positions. Rows at or beyond `filled_length` hold
leftovers of padded or rejected passes: masks hide them, and the next pass over them overwrites them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mtp_runtime.bundle.contract import TensorSpec
from mtp_runtime.errors import ContextFullError, MtpError


class CacheBuffer(Protocol):
    """Memory that the inference library binds to its graphs."""

    def write(self, values: NDArray[np.float32]) -> None:
        """Copy `values`, of the buffer's whole size, into it."""
        ...

    def read(self) -> NDArray[np.float32]:
        """Return a flat copy of the whole buffer."""
        ...


class CachePositions:
    """How many positions a cache has room for, and how many leading ones hold the rows of processed tokens."""

    def __init__(self, length: int) -> None:
        """Count the positions of a cache of `length` positions, none of them filled."""
        self._length = length
        self._filled = 0

    @property
    def length(self) -> int:
        """S, how many positions there is room for."""
        return self._length

    @property
    def filled_length(self) -> int:
        """How many leading positions hold the rows of processed tokens."""
        return self._filled

    def check_room(self, count: int) -> None:
        """Check that `count` more tokens fit.

        Raises:
            ContextFullError: `count` more tokens do not fit.
        """
        needed = self._filled + count
        if count < 0 or needed > self._length:
            raise ContextFullError(f"the cache has {self._length} positions, and {needed} are needed: shorten the text")

    def advance(self, count: int) -> None:
        """Count the next `count` positions as filled with processed tokens.

        Raises:
            ContextFullError: there are not that many left.
        """
        self.check_room(count)
        self._filled += count

    def rewind(self, filled_length: int) -> None:
        """Drop the rows at and beyond `filled_length`; nothing is copied or cleared.

        Raises:
            MtpError: fewer positions than that are filled.
        """
        if not 0 <= filled_length <= self._filled:
            raise MtpError(f"cannot rewind to {filled_length}: {self._filled} positions are filled")
        self._filled = filled_length


class StaticKVCache(CachePositions):
    """The buffers of every cache tensor and how many leading positions hold processed tokens.

    Shapes: each buffer is [1, G, S, D], those `slots_last` [1, G, D, S].
    """

    def __init__(
        self,
        specs: Iterable[TensorSpec],
        buffers: Mapping[str, CacheBuffer],
        length: int,
        *,
        slots_last: Collection[str] = (),
    ) -> None:
        """Take the `buffers` of the tensors `specs`, all of `length` positions, and zero them."""
        super().__init__(length)
        self._specs = {spec.name: spec for spec in specs}
        self._slots_last = frozenset(slots_last)
        self._buffers = dict(buffers)
        self.clear()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the cache tensors."""
        return tuple(self._specs)

    def buffer(self, name: str) -> CacheBuffer:
        """Return the one buffer of the tensor `name`."""
        return self._buffers[name]

    def clear(self) -> None:
        """Zero every row. Only hygiene: no result depends on rows beyond the filled ones."""
        for name, spec in self._specs.items():
            self._buffers[name].write(np.zeros(math.prod(spec.fixed_shape), np.float32))
        self._filled = 0

    def release(self) -> None:
        """Let go of the buffers; the cache is of no use afterwards."""
        self._buffers.clear()
        self._filled = 0

    def rows(self, name: str) -> NDArray[np.float32]:
        """Return a copy of the filled rows of the tensor `name`. Shapes: [1, G, filled, D]."""
        whole = self._buffers[name].read().reshape(self._specs[name].fixed_shape)
        return self._by_slot(name, whole)[:, :, : self._filled]

    def restore(self, rows: Mapping[str, NDArray[np.float32]]) -> None:
        """Replace everything by rows that `rows()` returned. Shapes: [1, G, filled, D] each."""
        wholes = {name: np.zeros(spec.fixed_shape, np.float32) for name, spec in self._specs.items()}
        by_slot = {name: self._by_slot(name, whole) for name, whole in wholes.items()}
        filled = check_rows(rows, {name: whole.shape for name, whole in by_slot.items()})
        for name, whole in wholes.items():
            by_slot[name][:, :, :filled] = rows[name]
            self._buffers[name].write(whole)
        self._filled = filled

    def _by_slot(self, name: str, whole: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a view of a whole cache as [1, G, S, D]."""
        return whole.swapaxes(2, 3) if name in self._slots_last else whole


def check_rows(rows: Mapping[str, NDArray[np.float32]], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many positions `rows` fill. Shapes: `shapes` are [1, G, S, D], the largest that rows can have.

    Raises:
        MtpError: a tensor is missing or unknown, or of another shape than the cache takes.
    """
    filled = {values.shape[2] if values.ndim == 4 else -1 for values in rows.values()}
    if rows.keys() != shapes.keys() or len(filled) != 1:
        raise MtpError(f"the rows of {sorted(rows)} do not fit the caches {sorted(shapes)}: they are of another bundle")
    (count,) = filled
    for name, (batch, groups, length, size) in shapes.items():
        expected = (batch, groups, count, size)
        if rows[name].shape != expected or not 0 <= count <= length:
            raise MtpError(f"the rows of {name} are {rows[name].shape}, expected {expected} of at most {length}")
    return count
