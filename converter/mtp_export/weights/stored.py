"""Weights that lie in the files of a bundle, turned back into float32 rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_export.weights.parameter import Parameter
from mtp_export.weights.quantise import unpack
from mtp_export.weights.recipes import FLOAT32


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A parameter as a graph has it: how many bits a value takes, and the weights that it stands for."""

    bits: int
    parameter: Parameter


def stored_weight(shape: tuple[int, ...], bits: int, rows: Callable[[int, int], NDArray[Any]]) -> StoredWeight:
    """Return a weight of which so many bits a value lie in a file, by the rows that it stands for."""
    return StoredWeight(bits=bits, parameter=Parameter(shape=shape, format=FLOAT32, rows=rows))


def scaled_rows(
    data: NDArray[np.uint8], shape: tuple[int, ...], bits: int, scales: NDArray[np.float32], zero: int
) -> Callable[[int, int], NDArray[np.float32]]:
    """Rows of quantised values. Shapes: data [R*C*bits/8], scales [R,blocks] or [1,1] for all rows."""
    columns = math.prod(shape[1:])
    row_bytes = columns * bits // 8

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        packed = data[start * row_bytes : stop * row_bytes]
        if zero:  # unsigned, with the zero in the middle
            packed = packed ^ np.uint8(sum(zero << (bits * i) for i in range(8 // bits)))
        values = unpack(packed, bits).astype(np.float32)
        factors = scales if len(scales) == 1 else scales[start:stop]
        scaled: NDArray[np.float32] = values.reshape(stop - start, factors.shape[1], -1) * factors[..., None]
        return scaled.reshape(stop - start, *shape[1:])

    return rows


def plain_rows(values: NDArray[Any], shape: tuple[int, ...]) -> Callable[[int, int], NDArray[Any]]:
    """Return a reader of rows that lie in a file as they are. Shapes: values [R*…] -> rows [stop-start,…]"""
    shaped = values.reshape(shape)
    return lambda start, stop: np.array(shaped[start:stop])
