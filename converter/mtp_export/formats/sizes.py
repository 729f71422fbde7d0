"""How large the files of a bundle will be, from traced graphs and the formats of their parameters: no weight is read.

What parameters take is exact. What describes a graph is counted from the operations of its segments on the meta device:
at E2B that is 0.2 % of a `.tflite`, whose header is large because it repeats every row's scale and zero point in each
signature. It is the whole of an `.onnx`, whose weights lie beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_export.config import ExportConfig
from mtp_export.graph.ir import Segment, TracedGraph
from mtp_export.weights.parameter import Parameter
from mtp_runtime.bundle.contract import BATCH_ROLES, batch_role

_ALIGNMENT = 64  # of a parameter in either format
_SECTION_BYTES = 16 << 10  # alignment of a section of a .litertlm
_SCALE_BYTES = 4 + 8  # float32 scale and int64 zero point of a row, in every subgraph that uses the parameter
# Of a tensor with its name, its shape and the operator that makes it: files of nano and E2B have 107 to 111.
_TENSOR_BYTES = 110
# Of a node with its names, of an initializer that lies in another file, of an input or output.
_NODE_BYTES, _INITIALIZER_BYTES, _VALUE_BYTES = 181, 108, 57
# Of each sequence's own attention in the graph of several, and of the nodes that split and join their rows.
_ATTENTION_BYTES, _JOIN_BYTES = 900, 650
_COMPRESSED = 0.2  # of a tokenizer.json in a .litertlm (zlib): nano's 0.17, E2B's 0.20
_SECTIONS_BESIDE_GRAPHS = 4  # the file's own header, metadata, manifest, tokenizer

# What linear layers dispatch besides their product, and views that cost nothing: no operation of a file.
_FREE = {"aten.t.default", "aten._unsafe_view.default", "aten.expand.default", "aten.clone.default"}
# Tensors that an operation becomes in TFLite, where that is not one: decomposed, or with operands of their own.
_TFLITE_TENSORS = {
    "mtp.rms_norm.default": 6.5,
    "aten.slice.Tensor": 3,
    "aten.select.int": 3,
    "mtp.update_cache.default": 4,
}
# Nodes that an operation becomes in ONNX: a shape that varies is computed, keys and values of no tokens are cut out.
_ONNX_NODES = {"aten.view.default": 2, "mtp.attend.default": 2}
_PORTABLE_NODES = {"aten.view.default": 2, "mtp.attend.default": 14, "mtp.write_and_attend.default": 30}


def graph_files(
    config: ExportConfig, graphs: Sequence[TracedGraph], values: Mapping[str, Mapping[str, Parameter]]
) -> dict[str, int]:
    """Bytes of the files of the graphs, by role."""
    if config.export_format == "tflite":
        return {graph.role: _tflite_bytes(graph, values[graph.role]) for graph in graphs}
    sizes: dict[str, int] = {}
    for graph in graphs:
        sizes[graph.role] = _onnx_bytes(graph, values[graph.role], portable=config.portable)
        sizes[f"{graph.role}_data"] = sum(_padded(_onnx_data_bytes(p)) for p in values[graph.role].values())
    for graph in graphs if config.batch_size > 1 else ():
        if graph.role in BATCH_ROLES:
            attentions = sum("attention" in call.segment for call in graph.signatures[0].calls)
            more = attentions * (_ATTENTION_BYTES * (config.batch_size - 1) + _JOIN_BYTES)
            sizes[batch_role(graph.role)] = sizes[graph.role] + more
    return sizes


def file_name(export_format: str, role: str) -> str:
    """Name of a graph's file, by the role that `graph_files` gives it."""
    if export_format == "tflite":
        return f"{role}.tflite"
    if role.endswith("_data"):
        return f"{role.removesuffix('_data')}.onnx.data"
    batched = {batch_role(single): single for single in BATCH_ROLES}
    return f"{batched[role]}.batch.onnx" if role in batched else f"{role}.onnx"


def litertlm_bytes(graph_sizes: Mapping[str, int], tokenizer: int, manifest: int) -> int:
    """Bytes of the container: every part in a section of its own, the tokenizer compressed."""
    parts = [*graph_sizes.values(), round(tokenizer * _COMPRESSED), manifest]
    sections = sum(-(-part // _SECTION_BYTES) for part in parts) + _SECTIONS_BESIDE_GRAPHS - 2
    return sections * _SECTION_BYTES


def stored_bytes(export_format: str, values: Mapping[str, Parameter]) -> int:
    """Bytes that the weights of a graph take in its file."""
    of_one = _tflite_data_bytes if export_format == "tflite" else _onnx_data_bytes
    return sum(of_one(parameter) for parameter in values.values())


def _tflite_bytes(graph: TracedGraph, values: Mapping[str, Parameter]) -> int:
    return _padded(_tflite_header_bytes(graph, values)) + sum(_padded(_tflite_data_bytes(p)) for p in values.values())


def _tflite_header_bytes(graph: TracedGraph, values: Mapping[str, Parameter]) -> int:
    made = _made(graph, _TFLITE_TENSORS)
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


def _tflite_data_bytes(parameter: Parameter) -> int:
    count, format = math.prod(parameter.shape), parameter.format
    scales = count // format.block_size if format.block_size and not parameter.unit_scale else 0
    return count * format.bits // 8 + 2 * scales  # float16


def _onnx_bytes(graph: TracedGraph, values: Mapping[str, Parameter], *, portable: bool) -> int:
    (traced,) = graph.signatures
    made = _made(graph, _PORTABLE_NODES if portable else _ONNX_NODES)
    nodes = round(sum(made[call.segment] for call in traced.calls))
    initializers = sum(2 if _is_blockwise(parameter) else 1 for parameter in values.values())
    ends = len(traced.signature.inputs) + len(traced.signature.outputs)
    return nodes * _NODE_BYTES + initializers * _INITIALIZER_BYTES + ends * _VALUE_BYTES


def _onnx_data_bytes(parameter: Parameter) -> int:
    """Every quantised matrix has scales of blocks, in float32."""
    from mtp_export.formats.onnx.write import block_size

    count, format = math.prod(parameter.shape), parameter.format
    scales = count // block_size(parameter) if _is_blockwise(parameter) else 0
    return count * format.bits // 8 + 4 * scales


def _is_blockwise(parameter: Parameter) -> bool:
    return parameter.format.bits < 32 and not parameter.unit_scale


def _made(graph: TracedGraph, weights: Mapping[str, float]) -> dict[str, float]:
    """What each segment becomes in a file, an operation being one unless `weights` says otherwise."""
    found = {key: _operations(segment) for key, segment in graph.segments.items()}
    return {key: sum(n * weights.get(name, 1) for name, n in counts.items()) for key, counts in found.items()}


def _operations(segment: Segment) -> Counter[str]:
    """The operations that a segment consists of, by name, without what no file has."""
    with torch.no_grad(), torch.device("meta"), _Recorder() as recorder:
        segment.module(**segment.inputs)
    found = recorder.found
    # A linear layer flattens its input first, which its operation in a file does by itself.
    found["aten.view.default"] -= found["aten.mm.default"]
    return Counter({name: count for name, count in found.items() if name not in _FREE and count > 0})


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that torch dispatches, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
