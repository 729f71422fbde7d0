"""GPTQ: the target's matrices rounded so that their products on calibration texts change least, in their own format.

A matrix is rounded column by column. The columns that are not rounded yet make up for a column's error, by the second
moments of its inputs (Frantar et al. 2022, arXiv 2210.17323). Scales are those that cost least
where inputs are large. Layers are taken in order, each on the outputs of the rounded ones before it.

Memory is that of the texts' activations, one segment of a layer in float32, and the second moments of its inputs with
two working copies; rounded values go to a file. The widest matrix of E2B has 12288 columns, so 0.6 GB a copy.

Shapes: R rows, C columns, T tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtp_calibration.same_model.float_pair import FloatTarget, OnProduct, restored
from mtp_export.graph.ir import Call
from mtp_export.source.pair import Pair
from mtp_export.source.stored_integers import Rows
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.recipes import WeightFormat

_DAMPING = 0.01  # of the mean second moment, added to each: directions that no text has are left alone
_TOGETHER = 128  # columns after which the others make up for their errors
_FRACTIONS = np.linspace(1.0, 0.5, 26)  # of the largest magnitude, tried as the largest level


def round_target(
    pair: Pair,
    formats: Mapping[str, WeightFormat],
    texts: Sequence[Sequence[int]],
    scratch: Path,
    on_parameter: Callable[[str], None] = lambda name: None,
) -> dict[str, Parameter]:
    """Round those of the target's matrices that have a format here, on the first tokens of texts.

    Rounded values lie in a file within `scratch` that has no name and goes with them.
    """
    file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  # maps of it outlive this function
    target = FloatTarget(pair, max(len(ids) for ids in texts))
    rounded: dict[str, Parameter] = {}

    def refit(call: Call, weights: Mapping[str, Tensor], run: Callable[[OnProduct], None]) -> Mapping[str, Tensor]:
        moments: dict[str, Tensor] = {}

        def add(leaf: str, inputs: Tensor) -> None:
            columns = inputs.shape[1]
            if call.weights[leaf] in formats:
                moments.setdefault(leaf, torch.zeros(columns, columns)).addmm_(inputs.T, inputs)

        run(add)
        changed = dict(weights)
        for leaf in list(moments):
            name = call.weights[leaf]
            rows = gptq(weights[leaf], moments.pop(leaf), formats[name])
            changed[leaf] = torch.from_numpy(restored(*rows))
            rounded[name] = _kept(rows, formats[name], file)
            on_parameter(name)
        return changed

    target.through_layers(texts, target.values, refit)
    return rounded


def _kept(rows: Rows, format: WeightFormat, file: IO[bytes]) -> Parameter:
    """Return a parameter of values that are written to a file and mapped."""

    def mapped(array: NDArray[Any]) -> NDArray[Any]:
        start = file.seek(0, 2)
        file.write(array.data)
        file.flush()
        return np.memmap(file, array.dtype, mode="r", offset=start, shape=array.shape)

    values, scales = (mapped(array) for array in rows)
    return Parameter(
        shape=values.shape,
        format=format,
        rows=lambda start, stop: Rows(values[start:stop], scales[start:stop]),
        stored=True,
    )


def gptq(weights: Tensor, moments: Tensor, format: WeightFormat) -> Rows:
    """Round a matrix. `moments` is the sum of x^T x over its inputs, and is consumed.

    Shapes: weights [R,C], moments [C,C] -> values [R,C], scales [R, C / block]
    """
    rows, columns = weights.shape
    block = format.block_size or columns
    diagonal = moments.diagonal().clone()
    scales = _scales(weights.view(rows, -1, block), diagonal.view(-1, block), format)
    by_column = scales.repeat_interleave(block, 1)
    # Columns that matter most come first: their errors can still be made up for.
    order = diagonal.argsort(descending=True)
    moments = moments[order][:, order]
    moments.diagonal().add_(_DAMPING * float(diagonal.mean()) + 1e-12)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    left, by_column = weights[:, order], by_column[:, order]
    values = torch.empty_like(left)
    low, high = _levels(format.bits)
    for start in range(0, columns, _TOGETHER):
        stop = min(columns, start + _TOGETHER)
        part, errors = left[:, start:stop].clone(), torch.empty(rows, stop - start)
        for i in range(stop - start):
            at = start + i
            values[:, at] = (part[:, i] / by_column[:, at]).round_().clamp_(low, high)
            errors[:, i] = (part[:, i] - values[:, at] * by_column[:, at]) / factor[at, at]
            part[:, i + 1 :] -= errors[:, i, None] * factor[at, at + 1 : stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    in_place = torch.empty(rows, columns, dtype=torch.int8)
    in_place[:, order] = values.to(torch.int8)
    return Rows(in_place.numpy(), scales.numpy())


def _levels(bits: int) -> tuple[int, int]:
    high = 2 ** (bits - 1) - 1
    return (-high if bits >= 8 else -high - 1), high


def _scales(blocks: Tensor, moments: Tensor, format: WeightFormat) -> Tensor:
    """Return for each block the scale whose rounding errors, weighted by their inputs' moments, are least.

    Shapes: blocks [R,G,block], moments [G,block] -> [R,G]
    """
    low, high = _levels(format.bits)
    most = blocks.abs().amax(-1).clamp_(min=1e-9) / high
    best, least = most, torch.full_like(most, torch.inf)
    for fraction in _FRACTIONS:
        scales = most * fraction
        if format.block_size:
            scales = scales.bfloat16().half().float()
        step = scales[..., None]
        errors = ((blocks / step).round_().clamp_(low, high) * step - blocks).square_().mul_(moments).sum(-1)
        better = errors < least
        best, least = torch.where(better, scales, best), torch.where(better, errors, least)
    return best
