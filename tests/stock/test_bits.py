"""At a length that is chosen at load, a token has the same bits in every pass: at every edge of what is read, at the
end of the context, and at the ends of rings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mtp_runtime.bundle.contract import read_manifest
from tests.conftest import Export
from tests.stock.chosen_length import Caches, Target, tensors, with_length

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
        kept[name] = target.without_positions(name, cache, slots)
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


@pytest.mark.parametrize("signature", ["prefill_16", "prefill_128"])
def test_a_padded_prefill_changes_nothing_that_is_read(decoded: Decoded, signature: str) -> None:
    """At every edge, and at the end of a ring, where its rows go on at the beginning."""
    target, rows = decoded.target, decoded.target.signatures[signature]
    for first in decoded.edges(rows):
        if first + rows <= target.context:
            filled = first + 1 + 7 * first % (rows - 1)
            _, caches = target.run(signature, first, decoded.caches[first], tokens=filled - first)
            padding = range(filled, first + rows)
            kept, expected = (
                {name: target.without_positions(name, cache, padding) for name, cache in of.items()}
                for of in (caches, decoded.caches[filled])
            )
            assert same(kept, expected) == [], first
            logits, _ = target.run("decode", filled, caches)
            assert np.array_equal(logits[0, 0].view(np.int32), decoded.logits[filled].view(np.int32)), first


def test_the_exported_length_is_in_shapes_alone(export_nano: Export) -> None:
    """Loaded for one context, bundles that were exported for two longest ones are the same, to every number: a table
    of all slots, or a constant that counts them, would differ."""
    exported = [export_nano("int8"), export_nano("int8", export_format="tflite-2000")]
    primes = [read_manifest(folder).cache_length for folder in exported]
    assert primes == [4099, 2053]
    for graph in ("target", "drafter"):
        models = [(folder / f"{graph}.tflite").read_bytes() for folder in exported]
        one, other = (tensors(with_length(*pair, 1000)) for pair in zip(models, primes, strict=True))
        assert one.keys() == other.keys()
        for signature, contents in one.items():
            assert any(tensor.content for tensor in contents), signature
            differing = [pair for pair in zip(contents, other[signature], strict=True) if pair[0] != pair[1]]
            assert [[tensor[:2] for tensor in pair] for pair in differing] == [], signature
