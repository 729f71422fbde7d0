"""What depends on positions alone, computed once per pass and read by every layer: rotary tables, what is seen, and
where the rows of a pass belong in the caches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtp_export.arch.spec import FULL, SLIDING, DecoderSpec
from mtp_export.models import cache_ops, ops
from mtp_export.models.layers import inverse_frequencies, rope_tables
from mtp_runtime.bundle.context import FULL_STEP

# Large against any score, and within float16: there 1e9 is infinite, and 0 times that no number. Taken off the score of
# a key once per position that it lies beyond the window, or put in the place of the score.
HIDDEN = 1e4
_SEEN = -1.0  # between what masks add to a key that is seen, 0, and to one that is not

# Kernels sum a row in lanes, element i in lane i modulo at most this. Where a position always falls into the same one,
# a token's sums come out the same to the last bit in every pass: else drafts could change what is said at a tie.
_LANES = 64


def counted(count: int) -> Tensor:
    """Return 0, 1, … Shapes: -> [count] int32"""
    return torch.tensor(range(count), dtype=torch.int32)  # an arange would be computed in 64 bits


class RotaryTables:
    """Cosine and sine of every layer type."""

    def __init__(self, spec: DecoderSpec, position_offset: int) -> None:
        self.position_offset = position_offset
        # Here and not in the call: values computed in float32 must not be part of what is traced.
        self.frequencies = {kind: inverse_frequencies(layer.rope, layer.head_dim) for kind, layer in spec.kinds.items()}

    def __call__(self, positions: Tensor) -> dict[str, Tensor]:
        """Shapes: positions [B,T] int32 -> `cos_…` and `sin_…` [B,T,1,D]"""
        out = {}
        for kind, frequencies in self.frequencies.items():
            cos, sin = rope_tables(positions + self.position_offset, frequencies)
            out[f"cos_{kind}"], out[f"sin_{kind}"] = cos, sin
        return out


class Window:
    """The slots that sliding layers read. `aligned` begins them at a multiple of `_LANES`, so that a token has the same
    bits in every pass (docs/decisions/0011). `ring`: how many slots their caches have, None for those of all caches."""

    def __init__(self, spec: DecoderSpec, *, aligned: bool, ring: int | None) -> None:
        size = spec.visible(spec.kinds[SLIDING])
        assert size is not None, "sliding layers have a window"
        self.size, self.aligned, self.ring = size, aligned, ring

    def __call__(self, input_pos: Tensor, mask: Tensor, slot_count: Tensor) -> dict[str, Tensor]:
        """Shapes: input_pos [T] int32, mask [1,1,T,S] additive, slot_count [1] int32 -> `window` [N] int32, places in
        the caches, and `mask_sliding_attention` [1,1,T,N]"""
        length = self.size - 1 + input_pos.shape[0]
        start = torch.clamp(input_pos[:1] - (self.size - 1), min=0)
        if self.aligned:
            start = cache_ops.floor_div(start, _LANES) * _LANES
            length = -(-(length + _LANES - 1) // _LANES) * _LANES
        positions = start + counted(length)
        # Behind the cache's end the last slot stands in, hidden by its distance.
        slots = torch.minimum(positions, slot_count - 1)
        distance = input_pos.to(torch.float32).reshape(1, 1, -1, 1) - positions.to(torch.float32)
        beyond = torch.clamp(self.size - 1 - distance, max=0.0) + torch.clamp(distance, max=0.0)
        window = slots if self.ring is None else cache_ops.floor_mod(slots, self.ring)
        return {"window": window, f"mask_{SLIDING}": ops.gather(mask, slots, 3) + beyond * HIDDEN}


def filled_slots(input_pos: Tensor, mask: Tensor, slot_count: Tensor) -> dict[str, Tensor]:
    """How many slots full layers read, and what they see of them: up to the last position, in steps.

    What is left out had a weight of exactly 0, so a token has the same bits however much is read, where contexts are
    multiples of `_LANES`. In others the last bits may be other ones, in every pass alike.

    Shapes: input_pos [T] int32, mask [1,1,T,S], slot_count [1] int32 -> `filled` [1] int32, `mask_full_attention`
        [1,1,T,n]
    """
    last = input_pos.amax(0, keepdim=True)  # of a padded pass, the last position may be anything
    filled = torch.minimum((cache_ops.floor_div(last, FULL_STEP) + 1) * FULL_STEP, slot_count)
    return {"filled": filled, f"mask_{FULL}": cache_ops.leading(mask, filled, 3)}


def places(first: Tensor, num_tokens: int, end: Tensor | int) -> dict[str, Tensor]:
    """Where the rows of a verify belong in caches that end at slot `end`: rows behind the end are left out.

    Shapes: first and end [1] int32 -> `at` [1], `slots` and `sources` [T] int32, as `cache_ops.merged_slots` has them
    """
    order = counted(num_tokens)
    over = torch.clamp(first + num_tokens - end, min=0)
    at = first - over
    row = order - over
    return {"at": at, "slots": at + order, "sources": torch.where(row < 0, order, row + num_tokens)}


def written(cache: Tensor, rows: Tensor, where: Mapping[str, Tensor], axis: int) -> Tensor:
    """Return a cache with the rows of a pass. Shapes: as `cache_ops.merged_slots` and `write_slots` have them."""
    if "slots" in where:
        rows = cache_ops.merged_slots(cache, rows, where["slots"], where["sources"], axis)
    out: Tensor = cache_ops.write_slots(cache, rows, where["at"], axis)
    return out


class WritePlaces:
    """Where the rows of a pass belong: `at_…`, and `slots_…` and `sources_…` where they are merged with what is there,
    of caches of full layers and, if those of sliding layers are rings, of these. `ends`: whether a pass may go past
    the end of the cache, as a verify does; it never reads what it writes there."""

    def __init__(self, ring: int | None, *, ends: bool) -> None:
        self.ring, self.ends = ring, ends

    def __call__(self, input_pos: Tensor, slot_count: Tensor) -> dict[str, Tensor]:
        """Shapes: input_pos [T] int32, slot_count [1] int32 -> [1] and [N] int32"""
        first, num_tokens = input_pos[:1], input_pos.shape[0]
        by_kind = {FULL: places(first, num_tokens, slot_count) if self.ends else {"at": first}}
        if self.ring is not None:
            by_kind[SLIDING] = self._in_ring(first, num_tokens, self.ring)
        return {f"{name}_{kind}": value for kind, part in by_kind.items() for name, value in part.items()}

    def _in_ring(self, first: Tensor, num_tokens: int, ring: int) -> dict[str, Tensor]:
        if num_tokens == 1:
            return {"at": cache_ops.floor_mod(first, ring)}
        if self.ends:  # the drafter sees to it that none behind the ring's end is accepted (docs/decisions/0022)
            return places(cache_ops.floor_mod(first, ring), num_tokens, ring)
        return dict(zip(("at", "slots", "sources"), cache_ops.ring_places(first, num_tokens, ring), strict=True))


def seen_slots(mask: Tensor, input_pos: Tensor, window: int) -> dict[str, Tensor]:
    """Return what each layer type sees of a whole cache.

    Float16 has all integers up to 2048, so positions count from the middle of caches of up to twice that; in longer
    ones a window's edge may be a slot or more off there. Integers themselves a GPU compares wrongly (docs/gpu.md).

    Shapes: mask [1,1,T,S] additive, input_pos [T] int32 -> `mask_…` [1,1,T,S] bool
    """
    length = mask.shape[3]
    middle = min(length // 2, 2048)
    slots = torch.arange(length, dtype=torch.int32) - middle
    distance = (input_pos - middle).to(torch.float32).reshape(1, 1, -1, 1) - slots.to(torch.float32)
    near = torch.where(window - distance > 0.0, mask, -HIDDEN)
    return {f"mask_{FULL}": mask > _SEEN, f"mask_{SLIDING}": near > _SEEN}
