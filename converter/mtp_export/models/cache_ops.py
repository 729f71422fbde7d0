"""Operations on caches whose length is chosen when a bundle is loaded, as torch custom ops.

A cache's slots are counted by a shape alone, never by a number in the graph: LiteRT-LM puts another number into the
shapes where they are multiples of a prime (docs/decisions/0022-context-at-load.md). Results marked with n have as many
slots as are filled, which is known when the graph runs; traced, they have the shape of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mtp::slot_count", mutates_args=())
def slot_count(mask: Tensor) -> Tensor:
    """How many slots a cache has. Shapes: mask [1,1,T,S] -> [1] int32"""
    return torch.tensor([mask.shape[3]], dtype=torch.int32)


@slot_count.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(1, dtype=torch.int32)


@torch.library.custom_op("mtp::floor_div", mutates_args=())
def floor_div(x: Tensor, divisor: int) -> Tensor:
    """x // divisor, of integers. Shapes: [N] int32 -> [N] int32"""
    return x // divisor


@torch.library.custom_op("mtp::floor_mod", mutates_args=())
def floor_mod(x: Tensor, divisor: int) -> Tensor:
    """x mod divisor, of integers. Shapes: [N] int32 -> [N] int32"""
    return x % divisor


@floor_div.register_fake
@floor_mod.register_fake
def _(x: Tensor, divisor: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mtp::leading", mutates_args=())
def leading(x: Tensor, count: Tensor, axis: int) -> Tensor:
    """The first `count` slots of `x`. Shapes: x [...] with S at `axis`, count [1] int32 -> x with n at `axis`"""
    return x.narrow(axis, 0, int(count[0])).clone()


@leading.register_fake
def _(x: Tensor, count: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mtp::attend_filled", mutates_args=())
def attend_filled(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """softmax(query @ keys^T + mask) @ values, over as many slots as there are.

    Shapes: query [1,G,M,D] with M = heads/G*T, head by head, keys [1,G,n,D], values [1,G,D,n], mask [1,1,T,n]
        -> [1,G,M,D]
    """
    scores = query @ keys.transpose(2, 3)
    shape = (1, -1, mask.shape[2], keys.shape[2])
    weights = torch.softmax(scores.reshape(shape) + mask, -1).reshape(scores.shape)
    return weights @ values.transpose(2, 3)


@attend_filled.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("mtp::write_slots", mutates_args=())
def write_slots(cache: Tensor, rows: Tensor, at: Tensor, axis: int) -> Tensor:
    """Write `rows` into `cache` from slot `at` on; the exported graph does it in place.

    Shapes: cache [1,G,S,D] with slots at `axis` 2, [1,G,D,S] at 3; rows likewise with N slots; at [1] int32 -> cache
    """
    out = cache.clone()
    out.narrow(axis, int(at[0]), rows.shape[axis]).copy_(rows)
    return out


@write_slots.register_fake
def _(cache: Tensor, *_: object) -> Tensor:
    return torch.empty_like(cache)


@torch.library.custom_op("mtp::ring_places", mutates_args=())
def ring_places(first: Tensor, num_tokens: int, ring: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the rows of a pass belong in a ring of `ring` slots, as `merged_slots` and `write_slots` take it.

    A pass within the ring's end writes its own slots, one that passes it all of them: few passes do.

    Shapes: first [1] int32 -> at [1], slots [N], sources [N] int32, N = num_tokens as traced and ring otherwise
    """
    start = int(first[0]) % ring
    whole = start + num_tokens > ring
    count, at = (ring, 0) if whole else (num_tokens, start)
    slots = torch.arange(at, at + count, dtype=torch.int32)
    row = (slots - start) % ring
    old = torch.arange(count, dtype=torch.int32)
    return torch.tensor([at], dtype=torch.int32), slots, torch.where(row < num_tokens, row + count, old)


@ring_places.register_fake
def _(first: Tensor, num_tokens: int, ring: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(first), first.new_empty(num_tokens), first.new_empty(num_tokens)


@torch.library.custom_op("mtp::merged_slots", mutates_args=())
def merged_slots(cache: Tensor, rows: Tensor, slots: Tensor, sources: Tensor, axis: int) -> Tensor:
    """What is to be in `slots` of a cache: of what is there and the new rows behind it, the places `sources`.

    Shapes: cache [1,G,S,D] with slots at `axis` 2, [1,G,D,S] at 3; rows likewise with T; slots and sources [N] int32
        -> likewise with N
    """
    old = cache.index_select(axis, slots.long())
    return torch.cat([old, rows], axis).index_select(axis, sources.long())


@merged_slots.register_fake
def _(cache: Tensor, rows: Tensor, slots: Tensor, sources: Tensor, axis: int) -> Tensor:
    shape = list(rows.shape)
    shape[axis] = slots.shape[0]
    return rows.new_empty(shape)
