"""How far a text can be taken back: the window of its end must still be in the ring behind all that was written."""

from __future__ import annotations

import msgspec
import pytest

from mtp_export.bundle.ring_reach import rewindable_tokens
from mtp_runtime.bundle.contract import Manifest
from tests.support.fake_backend import fake_manifest

WINDOW, LONGEST_PASS = 24, 16


def with_ring(length: int) -> Manifest:
    """Return a manifest with a ring, whose prefills have 8 and 16 tokens."""
    return msgspec.structs.replace(fake_manifest(), ring_length=length, target={"sliding_window": WINDOW})


def survives(ring: int, filled: int, taken_back: int) -> bool:
    """Return whether the ring still holds what a drafter reads before a position that is gone back to, slot by slot."""
    slots: dict[int, int] = {}
    for position in range(filled - 1 + LONGEST_PASS):  # the last pass had one token, and was filled up
        slots[position % ring] = position
    end = filled - taken_back
    return all(slots[position % ring] == position for position in range(end - (WINDOW + 1), end))


@pytest.mark.parametrize("ring", [40, 64, 128])
def test_all_that_is_promised_survives_and_no_more(ring: int) -> None:
    reach = rewindable_tokens(with_ring(ring))
    assert reach is not None
    filled = 10 * ring + 3
    assert all(survives(ring, filled, count) for count in range(reach + 1))
    assert not survives(ring, filled, reach + 1)


def test_without_a_ring_any_number_can_be_taken_back() -> None:
    assert rewindable_tokens(with_ring(0)) is None
