"""Which part of a mixed recipe gets how many bits."""

from __future__ import annotations

from mtp_calibration.choose.mixed import Part, chosen
from mtp_export.weights.recipes import INT4, INT8, WeightFormat

_SIZES = {"head": 100, "layer 0": 40, "layer 1": 40}  # bytes at 4 bits


COSTS = {"head": (0.5, 0.005), "layer 0": (0.1, 0.001), "layer 1": (0.3, 0.003)}


def bits(most_bytes: int) -> dict[str, int]:
    parts = [Part(name=name, parameters=(("target", name),), formats=(INT4, INT8)) for name in COSTS]

    def size(part: Part, format: WeightFormat) -> int:
        return _SIZES[part.name] * format.bits // 4

    formats = chosen(parts, COSTS, most_bytes, size)
    assert sum(size(p, formats[p.name]) for p in parts) <= most_bytes
    return {name: format.bits for name, format in formats.items()}


def test_bits_go_where_a_byte_takes_most_off() -> None:
    assert bits(180) == {"head": 4, "layer 0": 4, "layer 1": 4}
    # Of layer 1 a byte takes 0.0074 off, of the head 0.0050, of layer 0 0.0025.
    assert bits(220) == {"head": 4, "layer 0": 4, "layer 1": 8}
    assert bits(320) == {"head": 8, "layer 0": 4, "layer 1": 8}
    assert bits(360) == {"head": 8, "layer 0": 8, "layer 1": 8}


def test_room_that_is_too_small_for_the_best_goes_to_the_next() -> None:
    assert bits(300) == {"head": 4, "layer 0": 8, "layer 1": 8}
