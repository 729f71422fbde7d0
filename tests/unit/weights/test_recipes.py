"""Recipes, and the scales that their rules choose."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from mtp_export.weights.quantise import quantise, with_positive_scales
from mtp_export.weights.recipes import INT8, Q4_0, RECIPES, WeightFormat, with_embedders
from tools.synthesize.values import on_q4_0_lattice


def normals(rows: int, columns: int) -> NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal((rows, columns), np.float32) * np.float32(0.02)


def restored(values: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    blocks: NDArray[np.float32] = values.reshape(*scales.shape, -1) * scales[..., None]
    return blocks.reshape(values.shape)


def error(rows: NDArray[np.float32], format: WeightFormat) -> float:
    return float(np.square(restored(*quantise(rows, format)) - rows).mean())


@pytest.mark.parametrize(
    ("size", "columns", "expected"), [(256, 1536, 256), (256, 320, 64), (256, 32, 32), (32, 48, 0), (0, 320, 0)]
)
def test_blocks_are_halved_until_they_divide_the_columns(size: int, columns: int, expected: int) -> None:
    assert WeightFormat(bits=4, block_size=size).for_columns(columns).block_size == expected


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.9), (2, 0.5)])
def test_fitted_scales_have_less_error(bits: int, gain: float) -> None:
    rows = normals(64, 512)
    plain, fitted = (WeightFormat(bits=bits, block_size=256, scale=rule) for rule in ("max", "fitted"))
    assert error(rows, fitted) < gain * error(rows, plain)


def test_weights_on_the_q4_0_lattice_are_stored_as_they_are() -> None:
    rows = on_q4_0_lattice(normals(64, 256).reshape(-1)).reshape(64, 256)
    values, scales = quantise(rows, Q4_0)
    assert (scales < 0).any(), "half of the blocks have their largest value above zero, which takes a negative scale"
    np.testing.assert_array_equal(restored(values, scales), rows)
    assert error(rows, WeightFormat(bits=4, block_size=32)) > 0


def test_any_float16_scale_keeps_every_level_of_the_lattice() -> None:
    """bfloat16 rounds the products of a scale with more than five bits: levels survive, values come near."""
    rng = np.random.default_rng(3)
    levels = rng.integers(-8, 8, (256, 8, 32)).astype(np.float32)
    levels[..., 0] = -8
    scales = rng.uniform(0.001, 0.004, (256, 8)).astype(np.float16).astype(np.float32)
    rows = (levels * scales[..., None]).reshape(256, 256).astype(ml_dtypes.bfloat16).astype(np.float32)
    values, refitted = quantise(rows, Q4_0)
    np.testing.assert_array_equal(values.reshape(levels.shape), levels)
    assert np.abs(refitted / scales - 1).max() <= 2**-8


def test_a_block_of_zeros_has_a_scale_that_runtimes_take() -> None:
    for format in (Q4_0, RECIPES["mobile"].linear, RECIPES["mobile-plus"].per_layer_embedding):
        values, scales = quantise(np.zeros((2, 512), np.float32), format)
        assert not values.any()
        assert (np.abs(scales) >= np.finfo(np.float16).smallest_normal).all()


@pytest.mark.parametrize("bits", [4, 2])
def test_positive_scales_change_the_lowest_level_alone(bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = np.array([[low, high, 0, -1] * 8, [low, high, 0, -1] * 8], np.int8)
    scales = np.array([[-0.5], [0.25]], np.float32)
    turned, positive = with_positive_scales(values, scales, bits)
    assert positive.tolist() == [[0.5], [0.25]]
    assert turned[0, :4].tolist() == [high, -high, 0, 1]
    assert turned[1, :4].tolist() == [low, high, 0, -1]


def test_the_look_up_tables_of_another_recipe() -> None:
    mixed = with_embedders(RECIPES["int4"], RECIPES["mobile"])
    assert (mixed.head, mixed.linear) == (INT8, RECIPES["int4"].linear)
    assert mixed.per_layer_embedding.bits == 2
