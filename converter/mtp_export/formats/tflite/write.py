"""Quantise one parameter at a time and stream it to its place in the file.

The file is a flatbuffer header followed by the data, each buffer at an absolute offset: first the graph's own
constants, then the parameters, each written once and shared by all signatures. Memory is that of one block of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from mtp_export.errors import CheckpointError
from mtp_export.formats.tflite.chain import LoweredGraph
from mtp_export.weights.parameter import (
    OnBlock,
    Parameter,
    check_complete,
    row_blocks,
)
from mtp_export.weights.quantise import as_integers, pack, with_positive_scales
from mtp_export.weights.recipes import SMALLEST_SCALE

_ALIGNMENT = 64  # of every buffer, so that mapped weights suit any vector unit
_QUANTISED_TYPES = {8: schema.TensorType.INT8, 4: schema.TensorType.INT4, 2: schema.TensorType.INT2}
# Operators whose output is nothing but values of their first input.
_MOVES = (schema.BuiltinOperator.GATHER, schema.BuiltinOperator.RESHAPE)


def write_graph(
    lowered: LoweredGraph,
    parameters: Mapping[str, Parameter],
    path: Path,
    on_block: OnBlock = lambda size_bytes, name: None,
) -> None:
    """Write a `.tflite` with its weights. `on_block` is told of every block of a parameter that was written.

    `lowered` is consumed: its tensors are given their types and buffers.
    """
    model = lowered.model
    constants = [(i, b) for i, b in enumerate(model.buffers) if b.data is not None and len(b.data)]
    data = {i: np.asarray(buffer.data, np.uint8) for i, buffer in constants}
    for _, buffer in constants:
        _reserve(buffer)
    check_complete(lowered.role, lowered.weights, parameters)
    places = {
        name: _declare(model, lowered.weights[name], p) for name, p in parameters.items() if name in lowered.weights
    }
    header_bytes = _aligned(len(_serialise(model)))
    with path.open("wb") as file:
        file.seek(header_bytes)
        for i, constant in data.items():
            _write(file, model.buffers[i], iter([constant]))
        for name, place in places.items():
            _stream(file, model, name, parameters[name], place, on_block)
        end = file.tell()
        header = _serialise(model)
        if _aligned(len(header)) != header_bytes:
            raise AssertionError("the header changed its size when offsets and scales were filled in")
        file.seek(0)
        file.write(header)
        file.truncate(end)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """The tensors that a parameter is, each by its subgraph and its number there, and the buffers that they were given:
    the data, and for blockwise formats the scales."""

    tensors: Sequence[tuple[int, int]]
    data: schema.BufferT
    scales: schema.BufferT | None


def _new_buffer(model: schema.ModelT) -> tuple[int, schema.BufferT]:
    buffer = schema.BufferT()
    _reserve(buffer)
    model.buffers.append(buffer)
    return len(model.buffers) - 1, buffer


def _reserve(buffer: schema.BufferT) -> None:
    """Mark a buffer as lying outside the flatbuffer: any offset and size but 0, which flatbuffers would leave out."""
    buffer.data, buffer.offset, buffer.size = None, 1, 1


def _declare(model: schema.ModelT, tensors: Sequence[tuple[int, int]], parameter: Parameter) -> _Place:
    """Give the tensors of a parameter their type, quantisation and shared buffers."""
    index, data = _new_buffer(model)
    scales_index, scales = _new_buffer(model) if parameter.format.block_size else (0, None)
    for subgraph_index, tensor_index in tensors:
        subgraph = model.subgraphs[subgraph_index]
        tensor = subgraph.tensors[tensor_index]
        if tuple(tensor.shape) != parameter.shape:
            raise AssertionError(f"{tensor.name!r}: graph has {list(tensor.shape)}, parameter {parameter.shape}")
        tensor.buffer = index
        if parameter.format.bits == 32:
            continue
        tensor.type = _QUANTISED_TYPES[parameter.format.bits]
        if parameter.unit_scale:
            _retype_unit_scale(model, subgraph, tensor_index)
        elif parameter.format.block_size:
            tensor.quantization = _blockwise(subgraph, tensor, parameter, scales_index)
        else:
            # Values follow when they are known; the lengths must be right for the size of the header.
            tensor.quantization = _per_channel(np.zeros(parameter.shape[0], np.float32))
    return _Place(tensors=tensors, data=data, scales=scales)


def _per_channel(scales: NDArray[np.float32]) -> schema.QuantizationParametersT:
    quantisation = schema.QuantizationParametersT()
    quantisation.scale, quantisation.zeroPoint = scales, np.zeros(len(scales), np.int64)
    quantisation.quantizedDimension = 0
    return quantisation


def _blockwise(
    subgraph: schema.SubGraphT, tensor: schema.TensorT, parameter: Parameter, scales_buffer: int
) -> schema.QuantizationParametersT:
    rows, columns = parameter.shape
    scales = schema.TensorT()
    scales.name, scales.type, scales.buffer = tensor.name + b"_scales", schema.TensorType.FLOAT16, scales_buffer
    scales.shape, scales.hasRank = np.array([rows, columns // parameter.format.block_size], np.int32), True
    subgraph.tensors.append(scales)
    details = schema.BlockwiseQuantizationT()
    details.scales, details.zeroPoints = len(subgraph.tensors) - 1, -1
    details.blockSize = parameter.format.block_size
    quantisation = schema.QuantizationParametersT()
    quantisation.details = details
    quantisation.detailsType = schema.QuantizationDetails.BlockwiseQuantization
    return quantisation


def _retype_unit_scale(model: schema.ModelT, subgraph: schema.SubGraphT, tensor_index: int) -> None:
    """Make a table and all that is only gathered and reshaped from it int8 with scale 1.

    The chain ends as the filter of a FULLY_CONNECTED with float32 input, whose kernel multiplies int8 rows without
    turning them into float32 first.
    """
    moved = {tensor_index}
    for operator in subgraph.operators:
        code = model.operatorCodes[operator.opcodeIndex].builtinCode
        if code in _MOVES and int(operator.inputs[0]) in moved:
            moved.add(int(operator.outputs[0]))
    for index in moved:
        subgraph.tensors[index].type = schema.TensorType.INT8
        subgraph.tensors[index].quantization = _per_channel(np.ones(1, np.float32))


def _stream(
    file: BinaryIO, model: schema.ModelT, name: str, parameter: Parameter, place: _Place, on_block: OnBlock
) -> None:
    """Write a parameter's data and fill in its scales."""
    rows, columns = parameter.shape[0], parameter.shape[-1]
    quantised = parameter.format.bits < 32 and not parameter.unit_scale
    # One array for all: many small ones, kept between the large ones that come and go, would tear memory to pieces.
    scales = np.empty((rows, columns // (parameter.format.block_size or columns) if quantised else 0), np.float32)
    multiplied = _is_multiplied(model, place.tensors)

    def packed(rows: Any) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        if not quantised:
            return rows, None
        values, row_scales = as_integers(rows, parameter.format)
        if multiplied:
            values, row_scales = with_positive_scales(values, row_scales, parameter.format.bits)
        return pack(values, parameter.format.bits), row_scales

    def blocks() -> Iterator[NDArray[Any]]:
        done = 0
        for block, row_scales in row_blocks(parameter, packed):
            if row_scales is not None:
                scales[done : done + len(row_scales)] = row_scales
                done += len(row_scales)
            yield block
            on_block(block.nbytes, name)

    _write(file, place.data, blocks())
    if quantised and place.scales is None:
        for subgraph_index, tensor_index in place.tensors:
            model.subgraphs[subgraph_index].tensors[tensor_index].quantization.scale = scales.reshape(-1)
    elif place.scales is not None:
        _write(file, place.scales, iter([_half(name, scales)]))
        on_block(scales.nbytes // 2, name)


def _half(name: str, scales: NDArray[np.float32]) -> NDArray[np.float16]:
    """Scales of blocks as the format has them: exact where they have up to eleven significant bits.

    Raises:
        CheckpointError: a checkpoint's own scale is beyond what the runtimes take.
    """
    size = np.abs(scales)
    bad = (size < SMALLEST_SCALE) | (size > np.finfo(np.float16).max)
    if bad.any():
        raise CheckpointError(
            f"{name} is stored with a scale of {scales[bad][0]:g}, expected {SMALLEST_SCALE:g} to 65504, which is what "
            "blocks in a .tflite can have: take --format onnx, or the checkpoint in floats"
        )
    return scales.astype(np.float16)


def _is_multiplied(model: schema.ModelT, uses: Sequence[tuple[int, int]]) -> bool:
    """Whether a parameter is a filter of a FULLY_CONNECTED, and no look-up table."""
    subgraph_index, tensor_index = uses[0]
    return any(
        model.operatorCodes[operator.opcodeIndex].builtinCode == schema.BuiltinOperator.FULLY_CONNECTED
        and tensor_index in operator.inputs
        for operator in model.subgraphs[subgraph_index].operators
    )


def _write(file: BinaryIO, buffer: schema.BufferT, blocks: Iterator[NDArray[Any]]) -> None:
    """Write blocks at the next aligned position and note it in the buffer."""
    file.write(b"\0" * (_aligned(file.tell()) - file.tell()))
    buffer.offset = file.tell()
    for block in blocks:
        file.write(np.ascontiguousarray(block).data)
    buffer.size = file.tell() - buffer.offset


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _serialise(model: schema.ModelT) -> bytes:
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
