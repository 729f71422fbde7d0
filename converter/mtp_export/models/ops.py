"""The operations whose form decides the speed of the exported graph, as torch custom ops.

Each has one meaning here and one lowering per export format: left to a generic exporter, they become chains of bounds
checks, copies and transpositions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


def _like_the_first(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mtp::gather", mutates_args=())
def gather(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Take whole slices of `x` along `axis`. Shapes: x [...], indices [N] int32 -> x with N at `axis`"""
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
    """Compute `rms_norm` in primitive operations, for formats without one of their own.

    Shapes: x [...,N], weight [N] -> [...,N]
    """
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


@dataclasses.dataclass(frozen=True)
class Cache:
    """A layer's KV cache in a graph for any number of sequences, and how full it is.

    Shapes: key_cache and value_cache [B,G,S,D], last [B] int32, the slot of each sequence's last row, total [] int32,
    the largest last + 1.
    """

    key_cache: Tensor
    value_cache: Tensor
    last: Tensor
    total: Tensor

    def write_and_attend(
        self, query: Tensor, rows: tuple[Tensor, Tensor], num_heads: int, window: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write T rows behind those of the cache and attend to all of them, each token to those up to its own.

        The rows end at slot `last`. A window of 0 hides nothing; otherwise a token sees so many rows, its own included.

        Shapes: query [B,T,heads*D], rows two of [B,T,G*D] -> [B,T,heads*D], caches [B,G,S,D]
        """
        caches, fill = [self.key_cache, self.value_cache], [self.last, self.total]
        out: tuple[Tensor, Tensor, Tensor] = write_and_attend(query, [*rows], caches, fill, num_heads, window)
        return out

    def attend(self, query: Tensor, num_heads: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Attend alone, to rows that were written by others.

        The caches are returned as they are: where the exported operation is not given a place to return them to, it
        makes one, and copies them.

        Shapes: query [B,T,heads*D] -> [B,T,heads*D], caches [B,G,S,D]
        """
        caches, fill = [self.key_cache, self.value_cache], [self.last, self.total]
        out: tuple[Tensor, Tensor, Tensor] = attend(query, caches, fill, num_heads, window)
        return out


@torch.library.custom_op("mtp::write_and_attend", mutates_args=())
def write_and_attend(
    query: Tensor, rows: list[Tensor], caches: list[Tensor], fill: list[Tensor], num_heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cache.write_and_attend as an operation.

    Shapes: query [B,T,heads*D], rows two of [B,T,G*D], caches two of [B,G,S,D], fill [B] int32 and [] int32
        -> [B,T,heads*D], caches
    """
    batch, num_tokens, _ = query.shape
    groups, size = caches[0].shape[1], caches[0].shape[3]
    written = []
    for cache, new in zip(caches, rows, strict=True):
        cache = cache.clone()
        for b in range(batch):
            stop = int(fill[0][b]) + 1
            cache[b, :, stop - num_tokens : stop] = new[b].reshape(num_tokens, groups, size).transpose(0, 1)
        written.append(cache)
    return attend_to_rows(query, written, fill[0], num_heads, window), written[0], written[1]


@write_and_attend.register_fake
def _(
    query: Tensor, rows: list[Tensor], caches: list[Tensor], fill: list[Tensor], num_heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(caches[0]), torch.empty_like(caches[1])


@torch.library.custom_op("mtp::attend", mutates_args=())
def attend(
    query: Tensor, caches: list[Tensor], fill: list[Tensor], num_heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cache.attend as an operation.

    Shapes: query [B,T,heads*D], caches two of [B,G,S,D], fill [B] int32 and [] int32 -> [B,T,heads*D], caches
    """
    return attend_to_rows(query, caches, fill[0], num_heads, window), caches[0].clone(), caches[1].clone()


@attend.register_fake
def _(
    query: Tensor, caches: list[Tensor], fill: list[Tensor], num_heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(caches[0]), torch.empty_like(caches[1])


def attend_to_rows(query: Tensor, caches: list[Tensor], last: Tensor, num_heads: int, window: int) -> Tensor:
    """softmax(query @ keys^T) @ values, in plain torch.

    Shapes: query [B,T,heads*D], caches two of [B,G,S,D], last [B] int32 -> [B,T,heads*D]
    """
    keys, values = caches
    batch, num_tokens, width = query.shape
    groups, length, size = keys.shape[1:]
    slots = torch.arange(length)
    at = last[:, None] - (num_tokens - 1) + torch.arange(num_tokens)  # slot of each token, [B,T]
    seen = slots <= at[..., None]
    if window:
        seen &= slots > at[..., None] - window
    heads = query.reshape(batch, num_tokens, groups, num_heads // groups, size)
    scores = torch.einsum("btgqd,bgsd->bgqts", heads, keys)
    weights = torch.softmax(scores.masked_fill(~seen[:, None, None], float("-inf")), -1)
    return torch.einsum("bgqts,bgsd->btgqd", weights, values).reshape(batch, num_tokens, width)
