"""Where the rows of a pass are written: as if one row after the other were."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_export.models import cache_ops
from mtp_export.models.positions import WritePlaces, places, written

AXES = st.sampled_from([2, 3])
GROUPS = st.integers(1, 2)


def cache_of(slots: int, groups: int, axis: int, base: float) -> Tensor:
    """Numbers that are all different. Shapes: -> [1,G,S,2], or [1,G,2,S] with slots at axis 3"""
    rows = base + torch.arange(groups * slots * 2, dtype=torch.float32).reshape(1, groups, slots, 2)
    return rows if axis == 2 else rows.transpose(2, 3)


def one_by_one(cache: Tensor, rows: Tensor, slots: list[int | None], axis: int) -> Tensor:
    """Write each row to its slot, or leave it out. Shapes: as `cache_ops.write_slots` has them -> cache"""
    out = cache.clone()
    for number, slot in enumerate(slots):
        if slot is not None:
            out.select(axis, slot).copy_(rows.select(axis, number))
    return out


@given(st.data(), st.integers(1, 40), GROUPS, AXES)
@settings(max_examples=60)
def test_a_pass_over_a_ring_s_end_goes_on_at_its_beginning(
    data: st.DataObject, ring: int, groups: int, axis: int
) -> None:
    num_tokens, first = data.draw(st.integers(1, ring)), data.draw(st.integers(0, 4 * ring))
    cache, rows = cache_of(ring, groups, axis, 0.0), cache_of(num_tokens, groups, axis, 1000.0)
    at, slots, sources = cache_ops.ring_places(torch.tensor([first], dtype=torch.int32), num_tokens, ring)
    merged = cache_ops.merged_slots(cache, rows, slots, sources, axis)
    wrapped: list[int | None] = [(first + number) % ring for number in range(num_tokens)]
    assert cache_ops.write_slots(cache, merged, at, axis).equal(one_by_one(cache, rows, wrapped, axis))


@given(st.data(), st.integers(1, 40), GROUPS, AXES)
@settings(max_examples=60)
def test_rows_behind_the_end_are_left_out(data: st.DataObject, end: int, groups: int, axis: int) -> None:
    num_tokens, first = data.draw(st.integers(1, end)), data.draw(st.integers(0, 2 * end))
    cache, rows = cache_of(end, groups, axis, 0.0), cache_of(num_tokens, groups, axis, 1000.0)
    where = places(torch.tensor([first], dtype=torch.int32), num_tokens, torch.tensor([end], dtype=torch.int32))
    within = [first + number if first + number < end else None for number in range(num_tokens)]
    assert written(cache, rows, where, axis).equal(one_by_one(cache, rows, within, axis))


@given(st.data(), st.booleans())
def test_a_pass_writes_both_kinds_of_caches_row_by_row(data: st.DataObject, ends: bool) -> None:
    """`ends`: a verify, of which rows behind either end are left out."""
    ring, count = 32, 100
    num_tokens = data.draw(st.integers(1, 16))
    first = data.draw(st.integers(0, count - (1 if ends else num_tokens)))
    positions = torch.arange(first, first + num_tokens, dtype=torch.int32)
    where = WritePlaces(ring, ends=ends)(positions, torch.tensor([count], dtype=torch.int32))
    expected: dict[str, tuple[int, list[int | None]]] = {
        "full_attention": (count, [p if p < count else None for p in positions.tolist()]),
        "sliding_attention": (
            ring,
            [None if ends and first % ring + t >= ring else (first + t) % ring for t in range(num_tokens)],
        ),
    }
    for kind, (length, slots) in expected.items():
        part = {name.removesuffix(f"_{kind}"): value for name, value in where.items() if name.endswith(kind)}
        cache, rows = cache_of(length, 1, 2, 0.0), cache_of(num_tokens, 1, 2, 1000.0)
        assert written(cache, rows, part, 2).equal(one_by_one(cache, rows, slots, 2)), kind
