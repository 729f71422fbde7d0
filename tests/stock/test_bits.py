"""At a length that is chosen at load, a token has the same bits in every pass: at every edge of what is read, at the
end of the context, and at the ends of rings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mtp_runtime.bundle.contract import read_manifest
from tests.conftest import Export
from tests.stock.chosen_length import Caches, Target, integer_constants

STEP = 256  # full layers read so many slots more at a time


class Decoded:
    """What decoding gives, position by position."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.logits: list[Any] = []
        self.caches: list[Caches] = [target.empty()]
        for position in range(target.context):
            logits, caches = target.run("decode", position, self.caches[-1])
            self.logits.append(logits[0, 0])
            self.caches.append(caches)

    def edges(self, rows: int) -> list[int]:
        """Where a pass of so many rows has an edge among them, or right before or behind them."""
        ends = [self.target.context, *range(STEP, self.target.context, STEP)]
        return sorted({p for end in ends for p in range(end - rows - 1, end + 2) if 0 <= p < self.target.context})


@pytest.fixture(
    scope="module",
    params=[
        ("tflite-rings", "f32", 600),
        ("tflite", "int8", 300),
        pytest.param(("tflite-rings", "int8", 1100), marks=pytest.mark.long),
        pytest.param(("tflite-whole", "int8", 1100), marks=pytest.mark.long),
        pytest.param(("tflite", "int8", 200), marks=pytest.mark.long),
        pytest.param(("tflite", "int8", 128), marks=pytest.mark.long),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def decoded(request: pytest.FixtureRequest, export_nano: Export) -> Decoded:
    export_format, recipe, context = request.param
    return Decoded(Target(export_nano(recipe, export_format=export_format), context))


def same(one: Caches, other: Caches) -> list[str]:
    """Return the names of caches that differ in a bit."""
    return [name for name in one if not np.array_equal(one[name].view(np.int32), other[name].view(np.int32))]


def without_rejected(caches: Caches, target: Target, first: int, last: int) -> Caches:
    """Return caches without what a verify wrote from position `first` on, up to `last`: the next pass writes it anew,
    or the context ends there. Behind a ring's end it writes nothing."""
    kept = {}
    for name, cache in caches.items():
        in_ring = cache.shape[2] == target.ring
        slots = range(max(first, target.context), last) if in_ring else range(first, min(last, target.context))
        axis = 3 if cache.shape[2] < cache.shape[3] else 2  # of full layers' values
        kept[name] = np.ascontiguousarray(np.delete(cache, [p % cache.shape[axis] for p in slots], axis))
    return kept


def test_every_row_of_a_verify_is_a_decode(decoded: Decoded) -> None:
    """Up to the context's end and the ring's; rows behind them are nowhere that is ever read."""
    target, rows = decoded.target, decoded.target.signatures["verify"]
    for first in decoded.edges(rows):
        ends = [target.context - first, *([target.ring - first % target.ring] if target.ring else [])]
        count = min(rows, *ends)
        logits, caches = target.run("verify", first, decoded.caches[first])
        for row in range(count):
            assert np.array_equal(logits[0, row].view(np.int32), decoded.logits[first + row].view(np.int32)), first
        compared = (caches, decoded.caches[first + count])
        assert same(*(without_rejected(c, target, first + count, first + rows) for c in compared)) == [], first


@pytest.mark.parametrize("signature", ["prefill_16", "prefill_128"])
def test_a_prefill_leaves_what_decoding_does(decoded: Decoded, signature: str) -> None:
    target, rows = decoded.target, decoded.target.signatures[signature]
    for first in decoded.edges(rows):
        if first + rows <= target.context:
            _, caches = target.run(signature, first, decoded.caches[first])
            assert same(caches, decoded.caches[first + rows]) == [], first


def test_no_number_in_the_graphs_is_the_exported_length(export_nano: Export) -> None:
    folder = export_nano("int8")
    prime = read_manifest(folder).cache_length
    for graph in ("target", "drafter"):
        constants = integer_constants((folder / f"{graph}.tflite").read_bytes())
        for signature, values in constants.items():
            assert values, signature
            assert [value for value in values if abs(abs(value) - prime) <= 2] == [], signature
