"""The operations whose form decides the speed of the exported graph, as torch custom ops.

Each has one meaning here and one lowering per export format: left to a generic exporter, they become chains of bounds
checks, copies and transpositions.
"""

from __future__ import annotations

from collections.abc import Sequence

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
def _like_the_first(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


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


ZERO_POINT = 64  # of seven unsigned bits


@torch.library.custom_op("mtp::matmul_integer", mutates_args=())
def matmul_integer(x: Tensor, y: Tensor) -> Tensor:
    """(x - ZERO_POINT) @ y, exact in integers; the leading axes of x are stretched to those of y.

    Shapes: x [...,M,D] uint8, y [...,D,N] int8 -> [...,M,N] float32
    """
    return ((x.int() - ZERO_POINT) @ y.int()).float()


@matmul_integer.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return y.new_empty((*y.shape[:-2], x.shape[-2], y.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("mtp::matmul", mutates_args=())
def matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y over the last two axes. Shapes: x [...,M,N], y [...,N,D] -> [...,M,D]"""
    return x @ y


@matmul.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], y.shape[-1]))


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


@torch.library.custom_op("mtp::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis. Shapes: x [...,N], weight [N] -> [...,N]"""
    return decomposed_rms_norm(x, weight, eps)


def decomposed_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The same in primitive operations, for formats that have none of its own."""
    x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


rms_norm.register_fake(_like_the_first)


@torch.library.custom_op("mtp::rms_norm_composite", mutates_args=())
def rms_norm_composite(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`rms_norm`, exported as one operator that a GPU has a kernel for. Shapes: x [...,N], weight [N] -> [...,N]"""
    return decomposed_rms_norm(x, weight, eps)


rms_norm_composite.register_fake(_like_the_first)


@torch.library.custom_op("mtp::cache_update", mutates_args=())
def cache_update(
    rows: Sequence[Tensor], params: Tensor, caches: Sequence[Tensor], starts: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Write the rows of a pass into two caches, as one operator that a GPU has a kernel for.

    Rows, caches and starts are those of keys, then those of values. The kernel reads from `params` where the rows
    belong; every other backend starts at the slot that `starts` gives for each axis.

    Shapes: rows two of [1,G,T,D], params [1,1,1,7] int32, caches [1,G,S,D] and [1,G,D,S], starts two of [4] int32
        -> the caches
    """
    key_rows, value_rows = rows
    keys, values = (cache.clone() for cache in caches)
    num_tokens, at_key, at_value = key_rows.shape[2], int(starts[0][2]), int(starts[1][3])
    keys[:, :, at_key : at_key + num_tokens] = key_rows
    values[..., at_value : at_value + num_tokens] = value_rows.transpose(2, 3)
    return keys, values


@cache_update.register_fake
def _(rows: Sequence[Tensor], params: Tensor, caches: Sequence[Tensor], *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(caches[0]), torch.empty_like(caches[1])


@torch.library.custom_op("mtp::runtime_bmm", mutates_args=())
def runtime_bmm(x: Tensor, cache: Tensor, params: Tensor, of_values: bool) -> Tensor:
    """x @ cache^T over the last two axes, as one operator that a GPU has a kernel for.

    The kernel reads from `params` how many slots are filled. The other slots of keys are not computed, so a GPU may
    return anything there; those of values are not summed over.

    Shapes: x [1,G,M,D], keys [1,G,S,D] -> [1,G,M,S]; x [1,G,M,S], values [1,G,D,S] -> [1,G,M,D]; params [1,1,1,7] int32
    """
    return x @ cache.transpose(-1, -2)


@runtime_bmm.register_fake
def _(x: Tensor, cache: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], cache.shape[-2]))


@torch.library.custom_op("mtp::write_and_attend", mutates_args=())
def write_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    last: Tensor,
    total: Tensor,
    num_heads: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write T rows behind those of a cache and attend to all of them, each token to those up to its own.

    The rows end at slot `last[b]`; `total` is the largest last + 1. A window of 0 hides nothing; otherwise a token
    sees so many rows, its own included.

    Shapes: query [B,T,heads*D], key and value [B,T,G*D], caches [B,G,S,D], last [B] int32, total [] int32
        -> [B,T,heads*D], caches
    """
    batch, num_tokens, _ = query.shape
    groups, size = key_cache.shape[1], key_cache.shape[3]
    caches = []
    for cache, rows in ((key_cache, key), (value_cache, value)):
        cache = cache.clone()
        for b in range(batch):
            stop = int(last[b]) + 1
            cache[b, :, stop - num_tokens : stop] = rows[b].reshape(num_tokens, groups, size).transpose(0, 1)
        caches.append(cache)
    return attend_to_rows(query, caches[0], caches[1], last, num_heads, window), caches[0], caches[1]


@write_and_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key_cache), torch.empty_like(value_cache)


@torch.library.custom_op("mtp::attend", mutates_args=())
def attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, last: Tensor, total: Tensor, num_heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The attention of `write_and_attend` alone, over rows that were written by others.

    The caches are returned as they are: where the exported operation is not given a place to return them to, it makes
    one, and copies them.

    Shapes: query [B,T,heads*D], caches [B,G,S,D], last [B] int32, total [] int32 -> [B,T,heads*D], caches
    """
    return (
        attend_to_rows(query, key_cache, value_cache, last, num_heads, window),
        key_cache.clone(),
        value_cache.clone(),
    )


@attend.register_fake
def _(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key_cache), torch.empty_like(value_cache)


def attend_to_rows(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, last: Tensor, num_heads: int, window: int
) -> Tensor:
    """softmax(query @ keys^T) @ values, in plain torch. Shapes: as `attend`."""
    batch, num_tokens, width = query.shape
    groups, length, size = key_cache.shape[1:]
    slots = torch.arange(length)
    at = last[:, None] - (num_tokens - 1) + torch.arange(num_tokens)  # slot of each token, [B,T]
    seen = slots <= at[..., None]
    if window:
        seen &= slots > at[..., None] - window
    heads = query.reshape(batch, num_tokens, groups, num_heads // groups, size)
    scores = torch.einsum("btgqd,bgsd->bgqts", heads, key_cache)
    weights = torch.softmax(scores.masked_fill(~seen[:, None, None], float("-inf")), -1)
    return torch.einsum("bgqts,bgsd->btgqd", weights, value_cache).reshape(batch, num_tokens, width)
