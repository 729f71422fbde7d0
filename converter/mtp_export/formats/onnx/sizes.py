"""How large an `.onnx` and its data will be."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mtp_export.formats.onnx.write import block_size
from mtp_export.formats.sizes import operations_made
from mtp_export.graph.ir import TracedGraph
from mtp_export.weights.parameter import Parameter

# Of a node with its names, of an initializer that lies in another file, of an input or output.
_NODE_BYTES, _INITIALIZER_BYTES, _VALUE_BYTES = 181, 108, 57
# Of each sequence's own attention in the graph of several, and of the nodes that split and join their rows.
_ATTENTION_BYTES, _JOIN_BYTES = 900, 650
# Nodes that an operation becomes: a shape that varies is computed, keys and values of no tokens are cut out.
_NODES = {"aten.view.default": 2, "mtp.attend.default": 2}
_PORTABLE_NODES = {"aten.view.default": 2, "mtp.attend.default": 14, "mtp.write_and_attend.default": 30}


def graph_bytes(graph: TracedGraph, values: Mapping[str, Parameter], *, portable: bool) -> int:
    """Return the bytes of a graph without its data."""
    (traced,) = graph.signatures
    made = operations_made(graph, _PORTABLE_NODES if portable else _NODES)
    nodes = round(sum(made[call.segment] for call in traced.calls))
    initializers = sum(2 if _is_blockwise(parameter) else 1 for parameter in values.values())
    ends = len(traced.signature.inputs) + len(traced.signature.outputs)
    return nodes * _NODE_BYTES + initializers * _INITIALIZER_BYTES + ends * _VALUE_BYTES


def more_batch_bytes(graph: TracedGraph, sequences: int) -> int:
    """Return the bytes that the graph for several sequences has more than that for one."""
    attentions = sum("attention" in call.segment for call in graph.signatures[0].calls)
    return attentions * (_ATTENTION_BYTES * (sequences - 1) + _JOIN_BYTES)


def data_bytes(parameter: Parameter) -> int:
    """Return the bytes that a parameter takes: every quantised matrix has scales of blocks, in float32."""
    count, format = math.prod(parameter.shape), parameter.format
    scales = count // block_size(parameter) if _is_blockwise(parameter) else 0
    return count * format.bits // 8 + 4 * scales


def _is_blockwise(parameter: Parameter) -> bool:
    return parameter.format.bits < 32 and not parameter.unit_scale
