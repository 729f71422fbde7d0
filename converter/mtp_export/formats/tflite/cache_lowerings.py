"""How operations on caches whose length is chosen at load become TFLite's. Imported in worker processes alone.

A size that is known only when the graph runs must be declared so: XNNPACK fails at one that changes undeclared. So the
operators on filled slots are written here with their types, and none is left to the converter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from litert_converter.mlir import ir
from litert_torch.backend.lowerings import lower

from mtp_export.formats.tflite.lowerings import constant, matmul, result_types, tfl
from mtp_export.models import cache_ops  # noqa: F401  its operations are what is lowered

_ANY = ir.ShapedType.get_dynamic_size()
_PLAIN = {"fused_activation_function": "NONE"}


def _shape(value: Any) -> list[int]:
    return list(ir.RankedTensorType(value.type).shape)


def _with(shape: Sequence[int], axis: int, size: int) -> list[int]:
    return [size if i == axis else n for i, n in enumerate(shape)]


def _add(name: str, operands: Sequence[Any], shape: Sequence[int], like: Any, **attributes: Any) -> Any:
    """Add an operator; its result has this shape and the elements of `like`."""
    element = like if isinstance(like, ir.Type) else ir.RankedTensorType(like.type).element_type
    return tfl(name, operands, [ir.RankedTensorType.get(list(shape), element)], **attributes)


def _at(axis: int, rank: int, value: Any, elsewhere: Sequence[int]) -> Any:
    """A vector of `rank` integers: `value` [1] at `axis`, constants elsewhere."""
    parts = [constant(list(elsewhere[:axis]))] if axis else []
    parts += [value, *([constant(list(elsewhere[axis + 1 :]))] if axis + 1 < rank else [])]
    if len(parts) == 1:
        return value
    return _add("tfl.concatenation", parts, [rank], value, axis=0, **_PLAIN)


@lower(torch.ops.mtp.slot_count.default)
def _slot_count(context: Any, mask: Any) -> Any:
    # The shape of the mask itself would be folded into a constant. The slice begins behind the first slot: one that is
    # all of its input, as the mask's of a single token, would be dropped.
    rest = _add("tfl.slice", [mask, constant([0, 0, 0, 1]), constant([1, 1, 1, -1])], [1, 1, 1, _ANY], mask)
    sizes = _add("tfl.shape", [rest], [4], ir.IntegerType.get_signless(32))
    count = _add("tfl.slice", [sizes, constant([3]), constant([1])], [1], sizes)
    return tfl("tfl.add", [count, constant([1])], result_types(context), **_PLAIN)


@lower(torch.ops.mtp.floor_div.default)
def _floor_div(context: Any, x: Any, divisor: int) -> Any:
    return tfl("tfl.floor_div", [x, constant([divisor])], result_types(context))


@lower(torch.ops.mtp.floor_mod.default)
def _floor_mod(context: Any, x: Any, divisor: int) -> Any:
    return tfl("tfl.floor_mod", [x, constant([divisor])], result_types(context))


@lower(torch.ops.mtp.leading.default)
def _leading(context: Any, x: Any, count: Any, axis: int) -> Any:
    shape = _shape(x)
    sizes = _at(axis, len(shape), count, shape)
    return _add("tfl.slice", [x, constant([0] * len(shape)), sizes], _with(shape, axis, _ANY), x)


@lower(torch.ops.mtp.write_slots.default)
def _write_slots(context: Any, cache: Any, rows: Any, at: Any, axis: int) -> Any:
    return tfl("tfl.dynamic_update_slice", [cache, rows, _at(axis, 4, at, [0] * 4)], result_types(context))


@lower(torch.ops.mtp.merged_slots.default)
def _merged_slots(context: Any, cache: Any, rows: Any, slots: Any, sources: Any, axis: int) -> Any:
    shape, (count,) = _shape(rows), _shape(slots)
    merged = _ANY if count < 0 else count
    both = _ANY if count < 0 else count + shape[axis]
    old = _add("tfl.gather", [cache, slots], _with(shape, axis, merged), rows, axis=axis, batch_dims=0)
    joined = _add("tfl.concatenation", [old, rows], _with(shape, axis, both), rows, axis=axis, **_PLAIN)
    return _add("tfl.gather", [joined, sources], _with(shape, axis, merged), rows, axis=axis, batch_dims=0)


@lower(torch.ops.mtp.ring_places.default)
def _ring_places(context: Any, first: Any, num_tokens: int, ring: int) -> Any:
    def binary(name: str, x: Any, y: Any, shape: Sequence[int], like: Any = first, **options: Any) -> Any:
        return _add(f"tfl.{name}", [x, y], shape, like, **options)

    start = binary("floor_mod", first, constant([ring]), [1])
    end = binary("add", start, constant([num_tokens]), [1], **_PLAIN)
    # 1 where the pass fits, 0 where it passes the ring's end: ring // end is at least 1 up to there.
    fits = binary("minimum", binary("floor_div", constant([ring]), end, [1]), constant([1]), [1])
    at = binary("mul", start, fits, [1], **_PLAIN)
    fewer = binary("mul", fits, constant([ring - num_tokens]), [1], **_PLAIN)
    count = binary("sub", constant([ring]), fewer, [1], **_PLAIN)
    slots = _add("tfl.slice", [constant(list(range(ring))), at, count], [_ANY], first)
    old = _add("tfl.slice", [constant(list(range(ring))), constant([0]), count], [_ANY], first)
    row = binary("floor_mod", binary("sub", slots, start, [_ANY], **_PLAIN), constant([ring]), [_ANY])
    is_new = binary("less", row, constant([num_tokens]), [_ANY], ir.IntegerType.get_signless(1))
    new = binary("add", row, count, [_ANY], **_PLAIN)
    sources = _add("tfl.select_v2", [is_new, new, old], [_ANY], first)
    return at, slots, sources


@lower(torch.ops.mtp.attend_filled.default)
def _attend_filled(context: Any, query: Any, keys: Any, values: Any, mask: Any) -> Any:
    _, groups, rows, size = _shape(query)
    tokens = _shape(mask)[2]
    heads = groups * rows // tokens
    scores = _matmul(query, keys, [1, groups, rows, _ANY])
    scores = _add("tfl.reshape", [scores, constant([1, heads, tokens, -1])], [1, heads, tokens, _ANY], query)
    scores = _add("tfl.add", [scores, mask], [1, heads, tokens, _ANY], query, **_PLAIN)
    weights = _add("tfl.softmax", [scores], [1, heads, tokens, _ANY], query, beta=1.0)
    weights = _add("tfl.reshape", [weights, constant([1, groups, rows, -1])], [1, groups, rows, _ANY], query)
    return _matmul(weights, values, [1, groups, rows, size])


def _matmul(x: Any, y: Any, shape: Sequence[int]) -> Any:
    """Add x @ y^T."""
    element = ir.RankedTensorType(x.type).element_type
    return matmul(x, y, [ir.RankedTensorType.get(list(shape), element)], transposed=True)
