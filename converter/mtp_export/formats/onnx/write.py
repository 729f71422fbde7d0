"""Weights of an ONNX graph: quantised operations in place of float ones, and the data in a file beside the graph.

The data lies in `<role>.onnx.data`, each tensor at an aligned offset, written once as it is quantised; the graph names
file, offset and length (ONNX external data), so that neither is bound by protobuf's 2 GiB.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from mtp_export.formats.onnx.convert import MICROSOFT_DOMAIN, LoweredGraph
from mtp_export.weights.parameter import OnBlock, Parameter, check_complete, row_blocks
from mtp_export.weights.quantise import as_integers, pack

_ALIGNMENT = 64  # of every tensor, so that mapped weights suit any vector unit
# Columns that share a scale, whatever a recipe says. With 32, MatMulNBits gives a row the same bits however many
# rows it is computed with; with 128, the last bit differs, and drafts would change the output (docs/decisions/0005).
_BLOCK_SIZES = (32, 16)
_TABLE_BLOCK_SIZE = 256
_ACCURACY_LEVEL = 4  # activations in int8 too, which is what makes the operation fast
_NUMPY_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int8): TensorProto.INT8,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DataFile:
    """The open file of data, and the name by which the graph refers to it."""

    file: BinaryIO
    name: str

    def align(self) -> int:
        """Fill up to the next aligned offset, and return it."""
        self.file.write(b"\0" * (-self.file.tell() % _ALIGNMENT))
        return self.file.tell()


def write_onnx(
    lowered: LoweredGraph,
    parameters: Mapping[str, Parameter],
    path: Path,
    on_block: OnBlock = lambda size_bytes, name: None,
) -> None:
    """Write the graph at `path` and its data at `path` + `.data`. `lowered` is consumed.

    `on_block` is told of every block of a parameter that was written.
    """
    model = lowered.model
    check_complete(lowered.role, lowered.weights, parameters)
    data = path.with_name(path.name + ".data")
    with data.open("wb") as file:
        for name in lowered.weights:
            _write_parameter(model.graph, name, parameters[name], _DataFile(file=file, name=data.name), on_block)
    needed = sorted({node.domain for node in model.graph.node})
    for domain in needed:
        if domain not in {opset.domain for opset in model.opset_import}:
            model.opset_import.append(helper.make_opsetid(domain, 1))
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=True)


def block_size(parameter: Parameter) -> int:
    """Columns that share a scale: many in look-up tables of 2 bits, and few enough in all else."""
    columns, format = parameter.shape[-1], parameter.format
    if format.bits == 2 and parameter.looked_up:
        most = min(format.block_size or _TABLE_BLOCK_SIZE, _TABLE_BLOCK_SIZE)
        return dataclasses.replace(format, block_size=most).for_columns(columns).block_size
    return next(size for size in _BLOCK_SIZES if columns % size == 0)


def _write_parameter(
    graph: onnx.GraphProto, name: str, parameter: Parameter, data: _DataFile, on_block: OnBlock
) -> None:
    format = parameter.format
    if format.bits == 32 or parameter.unit_scale:
        start = data.align()
        for piece in row_blocks(parameter, lambda rows: rows):
            data.file.write(np.ascontiguousarray(piece).data)
            dtype = piece.dtype
            on_block(piece.nbytes, name)
        _declare(graph, name, _NUMPY_TYPES[dtype], parameter.shape, data, start)
        return
    rows, columns = parameter.shape
    size = block_size(parameter)
    blockwise = dataclasses.replace(format, block_size=size)
    # One array for all: many small ones, kept between the large ones that come and go, would tear memory to pieces
    # (5 GiB for E2B's per-layer embeddings).
    scales = np.empty((rows, columns // size), np.float32)

    def packed(block: Any) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        values, block_scales = as_integers(block, blockwise)
        # Both operations take unsigned values whose zero is in the middle.
        return pack((values.view(np.uint8) + np.uint8(1 << (format.bits - 1))).view(np.int8), format.bits), block_scales

    start = data.align()
    done = 0
    for block, block_scales in row_blocks(parameter, packed):
        data.file.write(np.ascontiguousarray(block).data)
        scales[done : done + len(block_scales)] = block_scales
        done += len(block_scales)
        on_block(block.nbytes, name)
    uses = _replace(graph, name, rows, columns, size, format.bits)
    shape: tuple[int, ...] = (rows, columns * format.bits // 8)
    if uses == "MatMulNBits":
        shape = (rows, columns // size, size * format.bits // 8)
    _declare(graph, f"{name}.quantised", TensorProto.UINT8, shape, data, start)
    start = data.align()
    data.file.write(scales.data)
    _declare(graph, f"{name}.scales", TensorProto.FLOAT, (rows, columns // size), data, start)
    on_block(scales.nbytes, name)


def _replace(graph: onnx.GraphProto, name: str, rows: int, columns: int, size: int, bits: int) -> str:
    """Let the operations that read a parameter read its quantised form; returns the operation that they became."""
    attributes: dict[str, Any] = {"bits": bits, "block_size": size}
    transposed = {node.output[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] == name}
    kinds: set[str] = set()
    kept: list[NodeProto] = []
    for node in graph.node:
        if transposed & set(node.output):
            continue
        if node.op_type == "MatMul" and node.input[1] in transposed:
            node.op_type, node.domain = "MatMulNBits", MICROSOFT_DOMAIN
            node.input[:] = [node.input[0], f"{name}.quantised", f"{name}.scales"]
            extra = {"N": rows, "K": columns, "accuracy_level": _ACCURACY_LEVEL}
            node.attribute.extend(helper.make_attribute(key, value) for key, value in (attributes | extra).items())
            kinds.add(node.op_type)
        elif node.op_type == "Gather" and node.input[0] == name:
            node.op_type, node.domain = "GatherBlockQuantized", MICROSOFT_DOMAIN
            node.input[:] = [f"{name}.quantised", node.input[1], f"{name}.scales"]
            extra = {"gather_axis": 0, "quantize_axis": 1}
            del node.attribute[:]
            node.attribute.extend(helper.make_attribute(key, value) for key, value in (attributes | extra).items())
            kinds.add(node.op_type)
        elif name in node.input:
            raise AssertionError(f"{node.name} ({node.op_type}) reads {name}, which is quantised")
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    (kind,) = kinds
    return kind


def _declare(graph: onnx.GraphProto, name: str, kind: int, shape: tuple[int, ...], data: _DataFile, start: int) -> None:
    """Add an initializer whose data is what was written since `start`."""
    tensor = TensorProto()
    tensor.name, tensor.data_type, tensor.data_location = name, kind, TensorProto.EXTERNAL
    tensor.dims.extend(shape)
    written = data.file.tell() - start
    itemsize = helper.tensor_dtype_to_np_dtype(kind).itemsize
    if written != math.prod(shape) * itemsize:
        raise AssertionError(f"{name}: {written} bytes were written for {shape}")
    for key, value in (("location", data.name), ("offset", str(start)), ("length", str(written))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    graph.initializer.append(tensor)
