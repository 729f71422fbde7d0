"""Seeded weights, as fast as a disk takes them.

Random numbers are drawn once: eight long stretches, each as large as its own scale, in steps over one octave. A row of
a matrix is a window of one stretch; where it begins is its own within the matrix, and follows from the seed, the
tensor's name and the row. So no two rows are alike, their sizes differ as those of trained rows do, and a row costs a
copy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from tools.synthesize.layout import StoredTensor

# Of a quantised value's step in standard deviations: with those, few values are beyond the last level.
STEPS = {8: 4 / 127, 4: 2.5 / 7, 2: 1.0}
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
        self._stretches: dict[str, NDArray[np.generic]] = {}  # by what they are for: a handful in a model

    def blocks(self, tensor: StoredTensor) -> Iterator[NDArray[np.generic]]:
        """Yield the tensor's values in the order of the file, bfloat16 by its bits."""
        key = self._key(tensor.name)
        if tensor.content == "permutation":
            yield np.random.default_rng(key).permutation(tensor.shape[0]).astype("<i8")
        elif tensor.content == "constant":
            yield np.array(tensor.values, "<i8" if tensor.dtype == "I64" else "<f4")
        elif len(tensor.shape) < 2:
            values = np.random.default_rng(key).uniform(0.75, 1.25, tensor.shape) * tensor.spread
            yield bfloat16_bits(np.asarray(values, np.float32))
        else:
            count = math.prod(tensor.shape[:-1])
            rows = max(1, _WRITE_BYTES // (tensor.item_bytes * tensor.shape[-1]))
            for start in range(0, count, rows):
                yield self._rows(tensor, key, start, min(start + rows, count))

    def _key(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed}/{name}".encode()).digest()[:8], "little")

    def _rows(self, tensor: StoredTensor, key: int, start: int, stop: int) -> NDArray[np.generic]:
        """Return rows of a matrix; of a tensor with more dimensions, in the order of the file.

        Shapes: -> [stop - start, columns]
        """
        name = f"{tensor.content} {tensor.dtype} {tensor.bits} {tensor.spread}"
        if name not in self._stretches:
            self._stretches[name] = self._stretched(tensor)
        stretches = self._stretches[name]
        # Blocks of a lattice, and the words of packed integers, must not be cut; a scale stands for itself.
        step = BLOCK if self._lattice or tensor.content == "integers" else 1
        count = _STRETCHES * _STARTS // step  # a power of two: an odd stride visits every window once
        needed = math.prod(tensor.shape[:-1])
        if needed > count:
            raise ValueError(f"{tensor.name} has {needed} rows, and there are {count} windows for them")
        stride, first = key >> 32 | 1, key & 0xFFFFFFFF
        window = (np.arange(start, stop, dtype=np.uint64) * np.uint64(stride) + np.uint64(first)) % np.uint64(count)
        if tensor.dtype == "I32":
            step = tensor.bits  # words of so many values
        begin = window % _STRETCHES * stretches.shape[1] + window // _STRETCHES * step
        rows: NDArray[np.generic] = sliding_window_view(stretches.reshape(-1), tensor.shape[-1])[begin.astype(np.int64)]
        return rows

    def _stretched(self, tensor: StoredTensor) -> NDArray[np.generic]:
        """Return all stretches for tensors of this kind. Shapes: -> [stretches, starts + longest row], or in words"""
        if tensor.content == "normal":
            return self._scaled(tensor.spread, tensor.dtype)
        if tensor.content == "scales":
            uniform = np.random.default_rng(self._seed).uniform(0.75, 1.25, self._normals.shape) * tensor.spread
            return bfloat16_bits(uniform) if tensor.dtype == "BF16" else uniform.astype("<f4")
        levels = normal_levels(self._normals, tensor.bits)
        return levels if tensor.dtype == "I8" else pack_words(levels, tensor.bits)

    def _scaled(self, spread: float, dtype: str) -> NDArray[np.generic]:
        """Return all stretches for matrices of this spread. Shapes: -> [stretches, starts + longest row]"""
        stored = np.empty(self._normals.shape, np.float32 if dtype == "F32" else np.uint16)
        for i, normals in enumerate(self._normals):
            values = normals * np.float32(spread * 2.0 ** ((i - (_STRETCHES - 1) / 2) / _STRETCHES))
            if self._lattice:
                values = on_q4_0_lattice(values)
            stored[i] = values if dtype == "F32" else bfloat16_bits(values)
        return stored


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


def normal_levels(values: NDArray[np.float32], bits: int) -> NDArray[np.int8]:
    """Standard normal values in the steps that their scales are made for (quantised.py)."""
    high = 2 ** (bits - 1) - 1
    levels: NDArray[np.int8] = np.clip(np.rint(values / np.float32(STEPS[bits])), -high - 1, high).astype(np.int8)
    return levels


def pack_words(values: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """As compressed-tensors packs: each value plus half its range, the first in the lowest bits of a word.

    Shapes: [R,C] -> [R, C * bits / 32], C a multiple of 32
    """
    unsigned = (values.astype(np.int32) + (1 << (bits - 1))).astype(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    joined = np.bitwise_or.reduce(unsigned.reshape(len(values), -1, len(shifts)) << shifts, axis=-1)
    words: NDArray[np.int32] = joined.astype("<u4").view("<i4")
    return words


def bfloat16_bits(values: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """Round to bfloat16 and give its bits."""
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)
