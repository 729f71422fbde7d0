"""A KV cache in two pools: full-attention layers keep every row, sliding layers only the last ones.

A kernel that attends to all rows of a buffer, window or not, must not be given a long one. Sliding layers therefore
have a short buffer whose first row is at `first_position`, a multiple of the stride: what lies before is put aside in
blocks of one stride, and taken back where a rewind needs it. `first_position` follows from `filled_length` alone, so
that a result never depends on how a position was reached. RoPE is in the rows already, so a row may lie anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mtp_runtime.bundle.contract import TensorSpec
from mtp_runtime.errors import MtpError
from mtp_runtime.generate.kv_cache import CachePositions, check_rows

FloatArray = NDArray[np.float32]

SLIDING_SLOTS = "sliding_slots"


class CacheRows(Protocol):
    """The rows of a cache tensor, wherever they are. Shapes: [1, G, slots, D]."""

    def read(self) -> FloatArray:
        """Return all rows: a copy, or the very memory, which `write` changes."""
        ...

    def write(self, rows: FloatArray) -> None:
        """Replace the leading rows. Shapes: rows [1, G, n, D]."""
        ...


class PooledKVCache(CachePositions):
    """Rows of every cache tensor, of one sequence. Shapes: each buffer is [1, G, slots, D]."""

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        length: int,
        window: int,
        longest_pass: int,
        allocate: Callable[[str, tuple[int, ...]], CacheRows],
    ) -> None:
        """Allocate room for `length` positions; a pass has at most `longest_pass` tokens.

        `window` rows of a sliding layer, and one more, are always at hand: the drafter sees one more than the target.
        `allocate` makes the zeroed rows of a tensor, by its name.
        """
        super().__init__(length)
        self._longest_pass = longest_pass
        self._kept, self._stride = window + 1, window
        sliding_length = min(length, self._kept + self._stride + longest_pass)
        self._sliding = {spec.name for spec in specs if spec.shape[2] == SLIDING_SLOTS}
        self._specs: dict[str, TensorSpec] = {}
        self._buffers: dict[str, CacheRows] = {}
        for spec in specs:
            groups, size = int(spec.shape[1]), int(spec.shape[3])
            slots = sliding_length if spec.name in self._sliding else length
            self._specs[spec.name] = TensorSpec(name=spec.name, shape=(1, groups, length, size), dtype=spec.dtype)
            self._buffers[spec.name] = allocate(spec.name, (1, groups, slots, size))
        self._short = sliding_length < length
        self._put_aside: dict[str, list[FloatArray]] = {name: [] for name in self._sliding}
        self._first = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the cache tensors."""
        return tuple(self._specs)

    @property
    def first_position(self) -> int:
        """Position of the first row in the buffers of sliding layers."""
        return self._first

    def settle(self, count: int = 0) -> None:
        """Bring the buffers of sliding layers to where the next pass, over `count` tokens, expects them.

        Raises:
            ContextFullError: `count` more tokens do not fit.
        """
        if count > self._longest_pass:
            raise MtpError(f"a pass has {count} tokens, at most {self._longest_pass} fit")
        self.check_room(count)
        first = self._first_row_at(self._filled)
        if first == self._first:
            return
        for name in self._sliding:
            buffer, aside = self._buffers[name], self._put_aside[name]
            rows = buffer.read()[:, :, : max(0, self._filled - self._first)]
            before = self._first // self._stride
            if first > self._first:
                moved = first - self._first
                aside.extend(np.split(rows[:, :, :moved].copy(), moved // self._stride, axis=2))
                rows = rows[:, :, moved:].copy()
            else:
                rows = np.concatenate([*aside[first // self._stride : before], rows], axis=2)
                rows = rows[:, :, : self._filled - first]
                del aside[first // self._stride :]
            buffer.write(rows)
        self._first = first

    def rewind(self, filled_length: int) -> None:
        """Drop the rows at and beyond `filled_length`, and settle.

        Raises:
            MtpError: fewer positions than that are filled.
        """
        super().rewind(filled_length)
        self.settle()

    def rows(self, name: str, filled_length: int | None = None) -> FloatArray:
        """Return a copy of the rows of the tensor `name` at the first `filled_length` positions, by default all that
        are filled. Shapes: [1, G, filled, D]."""
        if name not in self._sliding:
            rows = self._buffers[name].read()[:, :, : self._filled].copy()
        else:
            last = self._buffers[name].read()[:, :, : self._filled - self._first]
            rows = np.concatenate([*self._put_aside[name], last], axis=2)
        return rows[:, :, :filled_length]

    def restore(self, rows: Mapping[str, FloatArray]) -> None:
        """Replace everything by rows that `rows()` returned. Shapes: [1, G, filled, D] each."""
        filled = check_rows(rows, {name: spec.fixed_shape for name, spec in self._specs.items()})
        first = self._first_row_at(filled)
        for name, values in rows.items():
            start = first if name in self._sliding else 0
            self._buffers[name].write(values[:, :, start:])
            if name in self._sliding:
                self._put_aside[name] = [
                    values[:, :, at : at + self._stride].copy() for at in range(0, first, self._stride)
                ]
        self._filled, self._first = filled, first

    def _first_row_at(self, filled: int) -> int:
        """Return where the buffers of sliding layers begin once `filled` positions are filled."""
        return max(0, (filled - self._kept) // self._stride * self._stride) if self._short else 0
