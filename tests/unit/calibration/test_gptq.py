"""Rounding matrices together with their inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtp_calibration.choose.gptq import gptq
from mtp_calibration.same_model.float_pair import restored
from mtp_export.source.stored_integers import Rows
from mtp_export.weights.quantise import quantise
from mtp_export.weights.recipes import INT4, INT4_BLOCKS, INT8, WeightFormat


def correlated(columns: int) -> tuple[Tensor, Tensor]:
    """A matrix, and inputs of which few directions matter, as those of a network. Shapes: -> [R,C], [T,C]"""
    generator = torch.Generator().manual_seed(3)
    few = torch.randn(2000, columns // 8, generator=generator) @ torch.randn(columns // 8, columns, generator=generator)
    return torch.randn(48, columns, generator=generator), few + torch.randn(2000, columns, generator=generator)


def off_by(weights: Tensor, inputs: Tensor, rows: Rows) -> float:
    """Relative error of the product."""
    exact = inputs @ weights.T
    return float((inputs @ torch.from_numpy(restored(*rows)).T - exact).norm() / exact.norm())


@pytest.mark.parametrize("format", [INT4, INT4_BLOCKS, INT8, WeightFormat(bits=2, block_size=0)])
def test_products_change_far_less_than_with_the_nearest_values(format: WeightFormat) -> None:
    weights, inputs = correlated(256)
    nearest = Rows(*quantise(weights.numpy(), format))
    rows = gptq(weights, inputs.T @ inputs, format)
    assert rows.values.shape == nearest.values.shape
    assert rows.scales.shape == nearest.scales.shape
    high = 2 ** (format.bits - 1) - 1
    assert -high - 1 <= rows.values.min() < rows.values.max() <= high
    assert off_by(weights, inputs, rows) < 0.5 * off_by(weights, inputs, nearest)


def test_inputs_without_correlations_leave_the_nearest_values() -> None:
    """Nothing can be made up for then."""
    weights, _ = correlated(64)
    rows = gptq(weights, torch.eye(64), INT4)
    nearest = (weights / torch.from_numpy(rows.scales)).round().clamp(-8, 7)
    assert torch.equal(torch.from_numpy(rows.values), nearest.to(torch.int8))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weights, inputs = correlated(64)
    inputs[:, 5] = 0
    rows = gptq(weights, inputs.T @ inputs, INT4)
    assert off_by(weights, inputs, rows) < 0.1
