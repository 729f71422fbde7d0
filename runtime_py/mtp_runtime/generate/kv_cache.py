"""The KV cache: allocated once, shared by target and drafter, rewound by moving one number.

The target writes the rows of the tokens it processes at their positions. Rows at or beyond `filled_length` hold
leftovers of padded or rejected passes: masks hide them, and the next pass over them overwrites them.

Caches of sliding layers may be rings: position p is in slot p modulo R, in place of position p - R. Leftovers take such
places too, so a rewind is possible as long as all rows within the window are there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mtp_runtime.bundle.contract import TensorSpec
from mtp_runtime.errors import ContextFullError, MtpError, RowsLostError


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

    @property
    def pass_room(self) -> int:
        """How many tokens a pass of drafts may have here; a position is left for the token that it says behind them."""
        return self._length - self._filled - 1

    def keepable(self, count: int) -> int:
        """Return how many of the first `count` filled positions can be kept: all of them."""
        return count

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


class Rings(NamedTuple):
    """Which caches are rings, their number of slots, and how many positions before the next one are read of them."""

    names: frozenset[str]
    length: int
    window: int


class StaticKVCache(CachePositions):
    """The buffers of every cache tensor and how many leading positions hold processed tokens.

    Shapes: each buffer is [1, G, S, D], or [1, G, R, D] of `rings`, those `slots_last` with the last two swapped.
    """

    def __init__(
        self,
        specs: Iterable[TensorSpec],
        buffers: Mapping[str, CacheBuffer],
        length: int,
        *,
        slots_last: Collection[str] = (),
        rings: Rings | None = None,
    ) -> None:
        """Take the `buffers` of the tensors `specs`, all of `length` positions but `rings`, and zero them."""
        super().__init__(length)
        self._specs = {spec.name: spec for spec in specs}
        self._slots_last = frozenset(slots_last)
        self._buffers = dict(buffers)
        self._rings = rings
        self._oldest = 0  # position of the first row that is still in the rings
        self.clear()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the cache tensors."""
        return tuple(self._specs)

    @property
    def pass_room(self) -> int:
        """How many tokens a pass of drafts may have here: it ends before the rings do, and a position is left."""
        return min(super().pass_room, self.straight(self._filled))

    def straight(self, position: int) -> int:
        """Return how many rows from `position` on lie in the order of their slots, in every cache."""
        return self._length if self._rings is None else self._rings.length - position % self._rings.length

    def mark_written(self, end: int) -> None:
        """Say that rows up to position `end` were written, whether they are to be kept or not."""
        if self._rings is not None:
            self._oldest = max(self._oldest, end - self._rings.length)

    def keepable(self, count: int) -> int:
        """Return how many of the first `count` filled positions can be kept: all, or 0 where rows are lost."""
        window = 0 if self._rings is None else self._rings.window
        return count if self._oldest <= max(count - window, 0) else 0

    def rewind(self, filled_length: int) -> None:
        """Drop the rows at and beyond `filled_length`; nothing is copied or cleared.

        Raises:
            MtpError: fewer positions than that are filled.
            RowsLostError: rows within the window before it are lost. Going back to 0 is always possible.
        """
        if self._rings is not None and filled_length <= self._filled and self.keepable(filled_length) < filled_length:
            raise RowsLostError(
                f"cannot go back from token {self._filled} to {filled_length}: sliding layers keep about "
                f"{self._rings.length} tokens; begin at 0 (keep_length 0), or export with larger --rings"
            )
        super().rewind(filled_length)
        if filled_length == 0:
            self._oldest = 0

    def buffer(self, name: str) -> CacheBuffer:
        """Return the one buffer of the tensor `name`."""
        return self._buffers[name]

    def clear(self) -> None:
        """Zero every row. Only hygiene: no result depends on rows beyond the filled ones."""
        for name, spec in self._specs.items():
            self._buffers[name].write(np.zeros(math.prod(spec.fixed_shape), np.float32))
        self._filled = self._oldest = 0

    def release(self) -> None:
        """Let go of the buffers; the cache is of no use afterwards."""
        self._buffers.clear()
        self._filled = self._oldest = 0

    def rows(self, name: str, filled_length: int | None = None) -> NDArray[np.float32]:
        """Return a copy of the rows of the tensor `name` at the first `filled_length` positions, by default all that
        are filled; of a ring, those that are still there. Shapes: [1, G, n, D]."""
        end = self._filled if filled_length is None else filled_length
        whole = self._buffers[name].read().reshape(self._specs[name].fixed_shape)
        return self._by_slot(name, whole)[:, :, self._slots(name, min(self._oldest, end), end)]

    def restore(self, rows: Mapping[str, NDArray[np.float32]]) -> None:
        """Replace everything by rows that `rows()` returned. Shapes: [1, G, n, D] each."""
        wholes = {name: np.zeros(spec.fixed_shape, np.float32) for name, spec in self._specs.items()}
        by_slot = {name: self._by_slot(name, whole) for name, whole in wholes.items()}
        ring_names = frozenset() if self._rings is None else self._rings.names
        shapes = {name: whole.shape for name, whole in by_slot.items()}
        filled = check_rows(
            {name: values for name, values in rows.items() if name not in ring_names},
            {name: shape for name, shape in shapes.items() if name not in ring_names},
        )
        oldest = 0
        if self._rings is not None:
            oldest = filled - check_rows(
                {name: values for name, values in rows.items() if name in ring_names},
                {name: shapes[name] for name in ring_names},
            )
            if not 0 <= oldest <= max(filled - self._rings.window, 0):
                raise MtpError(f"{filled - oldest} rows of sliding layers do not do for {filled} tokens")
        for name, whole in wholes.items():
            by_slot[name][:, :, self._slots(name, oldest, filled)] = rows[name]
            self._buffers[name].write(whole)
        self._filled, self._oldest = filled, oldest

    def _slots(self, name: str, oldest: int, end: int) -> NDArray[np.int64] | slice:
        """Return the slots of the positions before `end`, of a ring from `oldest` on."""
        if self._rings is None or name not in self._rings.names:
            return slice(end)
        return np.arange(oldest, end) % self._rings.length

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
