"""Floats to integers and scales, and integers to bytes: the one home of levels, scales and packing."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtp_export.source import stored_integers
from mtp_export.weights.recipes import SMALLEST_SCALE, WeightFormat

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


def as_integers(
    rows: NDArray[np.float32] | stored_integers.Rows, format: WeightFormat
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise float rows; of rows that are integers already, repeat the scales for the smaller blocks of `format`.

    Shapes: rows [R,C] -> values [R,C], scales [R,1] or [R,C/block]
    """
    if not isinstance(rows, stored_integers.Rows):
        return quantise(rows, format)
    groups = rows.values.shape[1] // format.block_size if format.block_size else 1
    return rows.values, np.repeat(rows.scales, groups // rows.scales.shape[1], axis=1)


def quantise(rows: NDArray[np.float32], format: WeightFormat) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric quantisation, values rounded half to even: 8 bits use -127…127, fewer bits their full range.

    With the rule "max", scale = max|x| / (2^(bits-1) - 1), and the result is ai-edge-quantizer's, to the bit. Scales of
    blocks are rounded to bfloat16 and then float16; those of other rules may be negative.

    Shapes: rows [R,C] -> values [R,C], scales [R,1] or [R,C/block]
    """
    count, columns = rows.shape
    block = format.block_size or columns
    # In torch, whose reductions over short rows and roundings are several times as fast as numpy's.
    grouped = torch.from_numpy(rows).view(count, columns // block, block)
    limit = 2 ** (format.bits - 1) - 1
    scales = choose_scales(grouped, format)
    if format.block_size:
        scales = scales.bfloat16().half().float()
    lowest = -limit if format.bits >= 8 else -limit - 1
    values = (grouped / scales[..., None]).round_().clamp_(lowest, limit).to(torch.int8)
    return values.view(count, columns).numpy(), scales.numpy()


def pack(values: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Several values to a byte, the first in the low bits. Shapes: [R,C] -> [R*C*bits/8]"""
    flat = values.reshape(-1).view(np.uint8)
    if bits == 8:
        return flat
    per_byte, mask = 8 // bits, np.uint8(2**bits - 1)
    packed = flat[0::per_byte] & mask
    for i in range(1, per_byte):
        packed |= (flat[i::per_byte] & mask) << np.uint8(bits * i)
    return packed


def unpack(data: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Signed values of which several lie in a byte, the first in the low bits. Shapes: [N*bits/8] -> [N]"""
    if bits == 8:
        return data.view(np.int8)
    per_byte = 8 // bits
    # Shifted to the top of the byte and back, so that the sign comes along.
    parts = [((data << np.uint8(8 - bits * (i + 1))).view(np.int8) >> np.int8(8 - bits)) for i in range(per_byte)]
    return np.stack(parts, -1).reshape(-1)
