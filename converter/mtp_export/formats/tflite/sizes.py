"""How large a `.tflite` will be."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mtp_export.formats.sizes import operations_made, padded
from mtp_export.graph.ir import TracedGraph
from mtp_export.weights.parameter import Parameter

_SCALE_BYTES = 4 + 8  # float32 scale and int64 zero point of a row, in every subgraph that uses the parameter
# Of a tensor with its name, its shape and the operator that makes it: files of nano have 108 to 114.
_TENSOR_BYTES = 113
# Tensors that an operation becomes, where that is not one: decomposed, or with operands of their own.
_TENSORS = {
    "mtp.rms_norm.default": 6.5,
    "aten.slice.Tensor": 3,
    "aten.select.int": 3,
    "mtp.write_slots.default": 3.5,
    "mtp.merged_slots.default": 10,  # with what turns the rows of several tokens, which those of one do not need
    "mtp.ring_places.default": 24,
    "mtp.attend_filled.default": 11,
    "mtp.leading.default": 4.5,
    "mtp.slot_count.default": 9,
    "mtp.floor_div.default": 2,
    "mtp.floor_mod.default": 2,
}


def graph_bytes(graph: TracedGraph, values: Mapping[str, Parameter]) -> int:
    """Return the bytes of a graph's file."""
    return padded(_header_bytes(graph, values)) + sum(padded(data_bytes(p)) for p in values.values())


def _header_bytes(graph: TracedGraph, values: Mapping[str, Parameter]) -> int:
    made = operations_made(graph, _TENSORS)
    tensors, scales = 0.0, 0
    for traced in graph.signatures:
        used = {name for call in traced.calls for name in call.weights.values()}
        tensors += len(used) + len(traced.signature.inputs) + sum(made[call.segment] for call in traced.calls)
        for parameter in (values[name] for name in used):
            if parameter.format.block_size:
                tensors += 1  # which holds the scales of the blocks
            elif parameter.format.bits < 32:
                scales += 1 if parameter.unit_scale else parameter.shape[0]
    return round(tensors * _TENSOR_BYTES) + scales * _SCALE_BYTES


def data_bytes(parameter: Parameter) -> int:
    """Return the bytes that a parameter takes, its blocks' scales included."""
    count, format = math.prod(parameter.shape), parameter.format
    scales = count // format.block_size if format.block_size and not parameter.unit_scale else 0
    return count * format.bits // 8 + 2 * scales  # float16
