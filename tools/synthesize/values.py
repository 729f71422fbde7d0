"""Seeded weights, as fast as a disk takes them.

Random numbers are drawn once: eight long stretches, each as large as its own scale, in steps over one octave. A row of
a matrix is a window of one stretch; where it begins is its own within the matrix, and follows from the seed, the
tensor's name and the row. So no two rows are alike, their sizes differ as those of trained rows do, and a row costs a
copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from tools.synthesize.layout import StoredTensor

BLOCK = 32  # values that share a scale in q4_0
_STRETCHES = 8
_STARTS = 1 << 20  # in a stretch; with windows that begin at whole blocks, 2^18 in all: a row of any matrix has its own
_WRITE_BYTES = 8 << 20


class Values:
    """Makes the values of tensors, block by block."""

    def __init__(self, seed: int, *, longest_row: int, lattice: bool) -> None:
        """Draw the random numbers. With `lattice`, all matrices lie on the q4_0 lattice.

        Args:
            longest_row: columns of the widest matrix that will be asked for, a multiple of 32.
        """
        self._seed, self._lattice = seed, lattice
        generator = np.random.default_rng(seed)
        self._normals = generator.standard_normal((_STRETCHES, _STARTS + longest_row), dtype=np.float32)
        self._stretches: dict[float, NDArray[np.uint16]] = {}  # by spread: a handful of widths in a model

    def blocks(self, tensor: StoredTensor) -> Iterator[NDArray[np.generic]]:
        """Yield the tensor's values in the order of the file, as bits of bfloat16 or as int64."""
        key = self._key(tensor.name)
        if tensor.dtype == "I64":
            yield np.random.default_rng(key).permutation(tensor.shape[0]).astype("<i8")
        elif len(tensor.shape) == 1:
            values = np.random.default_rng(key).uniform(0.75, 1.25, tensor.shape) * tensor.spread
            yield bfloat16_bits(values.astype(np.float32))
        else:
            rows = max(1, _WRITE_BYTES // (2 * tensor.shape[1]))
            for start in range(0, tensor.shape[0], rows):
                yield self._rows(tensor, key, start, min(start + rows, tensor.shape[0]))

    def _key(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed}/{name}".encode()).digest()[:8], "little")

    def _rows(self, tensor: StoredTensor, key: int, start: int, stop: int) -> NDArray[np.uint16]:
        """Shapes: -> [stop - start, columns]"""
        if tensor.spread not in self._stretches:
            self._stretches[tensor.spread] = self._scaled(tensor.spread)
        stretches = self._stretches[tensor.spread]
        step = BLOCK if self._lattice else 1
        count = _STRETCHES * _STARTS // step  # a power of two: an odd stride visits every window once
        if tensor.shape[0] > count:
            raise ValueError(f"{tensor.name} has {tensor.shape[0]} rows, and there are {count} windows for them")
        stride, first = key >> 32 | 1, key & 0xFFFFFFFF
        window = (np.arange(start, stop, dtype=np.uint64) * np.uint64(stride) + np.uint64(first)) % np.uint64(count)
        begin = window % _STRETCHES * stretches.shape[1] + window // _STRETCHES * step
        rows: NDArray[np.uint16] = sliding_window_view(stretches.reshape(-1), tensor.shape[1])[begin.astype(np.int64)]
        return rows

    def _scaled(self, spread: float) -> NDArray[np.uint16]:
        """All stretches for matrices of this spread. Shapes: -> [stretches, starts + longest row]"""
        bits = np.empty(self._normals.shape, np.uint16)
        for i, normals in enumerate(self._normals):
            values = normals * np.float32(spread * 2.0 ** ((i - (_STRETCHES - 1) / 2) / _STRETCHES))
            bits[i] = bfloat16_bits(on_q4_0_lattice(values) if self._lattice else values)
        return bits


def on_q4_0_lattice(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Quantise as llama.cpp's `quantize_row_q4_0_ref` does, and back: in each block of 32, the value of largest
    magnitude becomes -8 times the scale, and the others its multiples from -8 to 7.

    The scale keeps five significant bits: then all products are exact in bfloat16, and the scale in float16.

    Shapes: [N] -> [N], N a multiple of 32
    """
    blocks = values.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    mantissa, exponent = np.frexp(largest / np.float32(-8))
    scales = np.ldexp(np.rint(mantissa * 32) / np.float32(32), exponent)
    levels = np.clip(np.rint(blocks / scales), -8, 7)
    out: NDArray[np.float32] = (levels * scales + np.float32(0)).reshape(-1)  # + 0: no negative zeros
    return out


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to bfloat16 and give its bits."""
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)
