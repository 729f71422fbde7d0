"""Scales of blocks of weights, by the rule that a recipe names."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtp_export.weights.recipes import WeightFormat

SMALLEST_SCALE = 2.0**-14  # float16's smallest normal number: runtimes refuse a scale below it
# What is tried of the largest magnitude. Two bits have the levels -2, -1, 0 and 1: negative scales turn them round.
_FITTED = {
    2: (0.35, 0.45, 0.55, 0.7, 0.85, -0.35, -0.45, -0.55, -0.7, -0.85),
    4: (1 / 7, 1 / 7.5, 1 / 8, 1 / 8.8, 1 / 9.6),
}


def choose_scales(grouped: Tensor, format: WeightFormat) -> Tensor:
    """A scale for each block. Shapes: [R,G,block] -> [R,G]"""
    high, low = grouped.amax(-1), grouped.amin(-1)
    if format.scale == "max":
        scales: Tensor = torch.maximum(high, -low).clamp_(min=1e-9) / (2 ** (format.bits - 1) - 1)
        return scales.clamp_(min=SMALLEST_SCALE) if format.block_size else scales
    if format.scale == "q4_0":
        # As llama.cpp's quantize_row_q4_0_ref: the value of largest magnitude becomes -8 times the scale.
        return _not_tiny(torch.where(high > -low, high, low) / -8)
    return _not_tiny(_fitted(grouped, torch.maximum(high, -low), format.bits))


def _fitted(grouped: Tensor, bound: Tensor, bits: int) -> Tensor:
    """The one of a few scales that has the least squared error, block by block."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    best, least = torch.ones_like(bound), torch.full_like(bound, torch.inf)
    for fraction in _FITTED[bits]:
        scales = _not_tiny(bound * fraction)
        step = scales[..., None]
        errors = (grouped / step).round_().clamp_(lowest, highest).mul_(step).sub_(grouped).square_().sum(-1)
        better = errors < least
        best, least = torch.where(better, scales, best), torch.where(better, errors, least)
    return best


def _not_tiny(scales: Tensor) -> Tensor:
    return torch.where(scales.abs() < SMALLEST_SCALE, SMALLEST_SCALE, scales)


def with_positive_scales(
    values: NDArray[np.int8], scales: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The same weights without negative scales, which XNNPACK refuses in a product.

    A block is turned round with its scale; its lowest level has no counterpart and becomes the highest, one step off.

    Shapes: values [R,C], scales [R,G] -> values [R,C], scales [R,G]
    """
    negative = scales < 0
    if not negative.any():
        return values, scales
    blocks = values.reshape(*scales.shape, -1)
    bounded = np.maximum(blocks, 1 - 2 ** (bits - 1))
    return np.where(negative[..., None], -bounded, blocks).reshape(values.shape), np.abs(scales)
