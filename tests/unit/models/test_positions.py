"""What a pass reads of caches, and when a drafter holds back, at any position."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_export.arch.published import NANO
from mtp_export.arch.spec import SLIDING, TargetSpec
from mtp_export.models.drafter import DrafterPrologue
from mtp_export.models.positions import Window, filled_slots
from mtp_export.models.ring import RingCheck

SEEN = -1.0  # what a mask adds to a slot that is seen is above it
RING = 128


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def causal(positions: Tensor, length: int) -> Tensor:
    """Shapes: positions [T] -> [1,1,T,S]"""
    return torch.where(torch.arange(length)[None] <= positions[:, None], 0.0, -1e9)[None, None]


def with_window(size: int) -> TargetSpec:
    layers = tuple(dataclasses.replace(la, window=size) if la.kind == SLIDING else la for la in NANO.target.layers)
    return dataclasses.replace(NANO.target, layers=layers)


@given(
    st.data(),
    st.integers(1, 40),
    st.integers(1, 16),
    st.sampled_from([None, RING]),
    st.booleans(),
)
def test_a_token_sees_its_window_and_nothing_else(
    data: st.DataObject, size: int, num_tokens: int, ring: int | None, aligned: bool
) -> None:
    """Each position of it once, however long the cache is, and whether it is a ring or not."""
    length = data.draw(st.integers(num_tokens, 700))
    first = data.draw(st.integers(0, length - num_tokens))
    positions = torch.arange(first, first + num_tokens, dtype=torch.int32)
    window = Window(with_window(size), aligned=aligned, ring=ring)
    read = window(positions, causal(positions, length), int32(length))
    # What is written so far: the position of a slot, -1 where nothing was.
    cache = torch.full((length if ring is None else ring,), -1)
    for position in range(first + num_tokens):
        cache[position % len(cache)] = position
    kept, mask = cache[read["window"].long()], read[f"mask_{SLIDING}"][0, 0]
    for position, row in zip(positions.tolist(), mask, strict=True):
        assert kept[row > SEEN].tolist() == list(range(max(0, position - size + 1), position + 1))
        assert (row[row > SEEN] == 0).all()


@given(st.data(), st.integers(1, 20))
def test_full_layers_read_up_to_the_last_position_in_steps(data: st.DataObject, num_tokens: int) -> None:
    length = data.draw(st.integers(num_tokens, 2100))
    first = data.draw(st.integers(0, length - num_tokens))
    positions = torch.arange(first, first + num_tokens, dtype=torch.int32)
    mask = causal(positions, length)
    read = filled_slots(positions, mask, int32(length))
    filled = int(read["filled"])
    assert first + num_tokens <= filled <= first + num_tokens + 255
    assert filled % 256 == 0 or filled == length
    assert read["mask_full_attention"].equal(mask[..., :filled])


@pytest.mark.parametrize("num_drafts", [1, 4])
@pytest.mark.parametrize("ring", [None, 32])
@torch.no_grad()
def test_a_drafter_holds_back_near_both_ends_and_nowhere_else(num_drafts: int, ring: int | None) -> None:
    """Of what it drafts no row is left out, and behind the drafts there is room for what the target says itself."""
    length = 70
    module = DrafterPrologue(NANO.drafter, 1, num_drafts=num_drafts, ring=ring)
    activations = torch.zeros(1, 1, 2 * NANO.drafter.backbone_hidden_size)
    for processed in range(1, length):
        last = int32(processed - 1)
        drafts = module(activations, last, causal(last, length))["drafts"]
        fits = processed + num_drafts + 1 < length and (ring is None or processed % ring + num_drafts < ring)
        assert drafts.tolist() == [int(fits)], processed


@given(
    st.lists(st.tuples(st.integers(1, 5), st.just(0) | st.just(0) | st.integers(0, 80)), min_size=1, max_size=12),
    st.integers(0, 200),
)
@example([(1, 70), *[(5, 0)] * 4], 200)
@settings(max_examples=50)
def test_a_ring_that_was_taken_back_too_far_is_noticed(passes: list[tuple[int, int]], filled: int) -> None:
    """`passes`: how many tokens each has, and by how many the text is taken back before."""
    window, ring = 9, 64
    rows, at = [0] * ring, filled
    for position in range(filled):
        rows[position % ring] = position
    check, cache = RingCheck(window, ring), torch.tensor(rows, dtype=torch.float32).reshape(1, 1, ring, 1)
    for num_tokens, back in passes:
        at = max(0, at - back)
        if at % ring + num_tokens > ring:
            num_tokens = ring - at % ring
        before = range(max(0, at - window + 1), at)
        lost = any(rows[position % ring] != position for position in before)
        positions = torch.arange(at, at + num_tokens, dtype=torch.int32)
        out = check(positions, cache, at=int32(at % ring))
        assert out["lost"].tolist() == [float(lost)]
        cache = out["positions"]
        for position in positions.tolist():
            rows[position % ring] = -1 if lost else position  # none: what follows is lost too
        at += num_tokens
