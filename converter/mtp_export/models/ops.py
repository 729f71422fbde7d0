"""The operations whose form decides the speed of the exported graph, as torch custom ops.

Each has one meaning here and one lowering per export format: left to a generic exporter, they become chains of bounds
checks, copies and transpositions.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mtp::update_cache", mutates_args=())
def update_cache(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    """Write `rows` into `cache` from slot `position[0]` on; the exported graph does it in place.

    Shapes: cache [1,G,S,D], rows [1,G,T,D], position [T] int32 -> [1,G,S,D]
    """
    start = int(position[0])
    out = cache.clone()
    out[:, :, start : start + rows.shape[2]] = rows
    return out


@update_cache.register_fake
def _(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    return torch.empty_like(cache)


@torch.library.custom_op("mtp::gather", mutates_args=())
def gather(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Take whole slices of `x` along `axis`. Shapes: indices [N] int32 -> x with size N at `axis`."""
    return x.index_select(axis, indices.long())


@gather.register_fake
def _(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = indices.shape[0]
    return x.new_empty(shape)


@torch.library.custom_op("mtp::matmul_transposed", mutates_args=())
def matmul_transposed(x: Tensor, y: Tensor) -> Tensor:
    """x @ y^T over the last two axes. Shapes: x [...,M,D], y [...,N,D] -> [...,M,N]"""
    return x @ y.transpose(-1, -2)


@matmul_transposed.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], y.shape[-2]))


@torch.library.custom_op("mtp::top_k", mutates_args=())
def top_k(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest values of the last axis, best first. Shapes: x [1,N] -> [1,k] int32"""
    return x.topk(k, dim=-1).indices.to(torch.int32)


@top_k.register_fake
def _(x: Tensor, k: int) -> Tensor:
    return x.new_empty((x.shape[0], k), dtype=torch.int32)


@torch.library.custom_op("mtp::scatter", mutates_args=())
def scatter(indices: Tensor, values: Tensor, size: int) -> Tensor:
    """Put `values` at `indices` of a vector of zeros. Shapes: indices [N] int32, values [N] -> [size]"""
    return values.new_zeros(size).scatter(0, indices.long(), values)


@scatter.register_fake
def _(indices: Tensor, values: Tensor, size: int) -> Tensor:
    return values.new_empty(size)
