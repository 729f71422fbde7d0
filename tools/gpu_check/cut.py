"""One operator of a graph as a model of its own, with random data in place of what is not there."""

from __future__ import annotations

import copy
import math
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from mtp_export.formats.tflite.gpu_table import Graph, Operator

SIGNATURE = "op"
NUMPY: dict[int, np.dtype[Any]] = {
    schema.TensorType.FLOAT32: np.dtype(np.float32),
    schema.TensorType.FLOAT16: np.dtype(np.float16),
    schema.TensorType.INT32: np.dtype(np.int32),
    schema.TensorType.INT8: np.dtype(np.int8),
    schema.TensorType.BOOL: np.dtype(np.bool_),
}


def cut_out(graph: Graph, place: Operator) -> bytes:
    """Return a TFLite file of the one operator at `place`, whose variable inputs are the model's; constants stay."""
    subgraph = graph.model.subgraphs[place.subgraph]
    operator = subgraph.operators[place.index]
    model = schema.ModelT()
    model.version, model.buffers = 3, [schema.BufferT()]
    model.operatorCodes = [graph.model.operatorCodes[operator.opcodeIndex]]
    single = schema.SubGraphT()
    single.name, single.tensors = SIGNATURE.encode(), []
    copies: dict[int, int] = {-1: -1}
    variable: list[int] = []
    for index in dict.fromkeys(int(i) for i in (*operator.inputs, *operator.outputs)):
        if index < 0:
            continue
        copies[index] = len(single.tensors)
        single.tensors.append(_copy(graph, subgraph.tensors[index], model))
        if not graph.is_constant(subgraph.tensors[index]):
            variable.append(index)
    for tensor in list(single.tensors):  # scales of blocks are tensors too
        details = None if tensor.quantization is None else tensor.quantization.details
        if details is not None:
            tensor.quantization = copy.deepcopy(tensor.quantization)
            tensor.quantization.details.scales = len(single.tensors)
            single.tensors.append(_copy(graph, subgraph.tensors[details.scales], model))
    for number, tensor in enumerate(single.tensors):
        tensor.name = f"t{number}".encode()
    outputs = [int(i) for i in operator.outputs]
    new = schema.OperatorT()
    new.__dict__.update(operator.__dict__)
    new.opcodeIndex = 0
    new.inputs = np.array([copies[int(i)] for i in operator.inputs], np.int32)
    new.outputs = np.array([copies[i] for i in outputs], np.int32)
    single.operators = [new]
    single.inputs = np.array([copies[i] for i in variable if i not in outputs], np.int32)
    single.outputs = new.outputs
    entry = schema.SignatureDefT()
    entry.signatureKey, entry.subgraphIndex = SIGNATURE.encode(), 0
    entry.inputs = [_named(f"in{n}", int(i)) for n, i in enumerate(single.inputs)]
    entry.outputs = [_named(f"out{n}", int(i)) for n, i in enumerate(single.outputs)]
    model.subgraphs, model.signatureDefs, model.metadata = [single], [entry], []
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _copy(graph: Graph, tensor: Any, model: Any) -> Any:
    new = schema.TensorT()
    new.__dict__.update(tensor.__dict__)
    new.buffer = 0
    data = graph.constant(tensor)
    if data is not None:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(data, np.uint8)
        model.buffers.append(buffer)
        new.buffer = len(model.buffers) - 1
    return new


def _named(name: str, index: int) -> Any:
    item = schema.TensorMapT()
    item.name, item.tensorIndex = name.encode(), index
    return item


def inputs_for(graph: Graph, place: Operator, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Draw random values for the inputs of a cut-out operator; indices lie in their range, positions are small."""
    subgraph = graph.model.subgraphs[place.subgraph]
    operator = subgraph.operators[place.index]
    random = np.random.default_rng(seed)
    values: dict[str, NDArray[Any]] = {}
    seen: set[int] = set()
    for slot, index in enumerate(int(i) for i in operator.inputs):
        if index < 0 or index in seen or graph.is_constant(subgraph.tensors[index]):
            continue
        seen.add(index)
        tensor = subgraph.tensors[index]
        shape = tuple(int(n) for n in tensor.shape) if tensor.shape is not None else ()
        dtype: Any = NUMPY[tensor.type]
        if dtype == np.int32:
            value = _integers(graph, place, slot, shape, random)
        elif dtype == np.int8:
            value = random.integers(-127, 128, shape, np.int8)
        elif dtype == np.bool_:
            value = random.integers(0, 2, shape).astype(np.bool_)
        else:
            value = random.standard_normal(shape).astype(dtype)
            if place.name in ("RSQRT", "SQRT", "LOG"):
                value = np.abs(value) + dtype.type(0.1)
        values[f"in{len(values)}"] = value
    return values


def _integers(
    graph: Graph, place: Operator, slot: int, shape: tuple[int, ...], random: np.random.Generator
) -> NDArray[Any]:
    """Draw the integers of one input of an operator, such that it can run."""
    subgraph = graph.model.subgraphs[place.subgraph]
    operator = subgraph.operators[place.index]
    shapes = [subgraph.tensors[int(index)].shape for index in operator.inputs]
    if place.name == "RESHAPE" and slot == 1:  # a shape made at run time: that of the output
        out = subgraph.tensors[int(operator.outputs[0])].shape
        return np.array(out if out is not None else [], np.int32).reshape(shape)
    if place.name == "DYNAMIC_UPDATE_SLICE" and slot == 2:  # a place where the update fits
        return np.array([min(3, int(a) - int(b)) for a, b in zip(shapes[0], shapes[1], strict=True)], np.int32)
    if place.name == "SCATTER_ND" and slot == 0:
        size = int(np.frombuffer(graph.constant(subgraph.tensors[int(operator.inputs[2])]) or b"", np.int32)[0])
        return random.permutation(size)[: math.prod(shape)].astype(np.int32).reshape(shape)
    if place.name == "GATHER" and slot == 1:
        return random.integers(0, int(shapes[0][operator.builtinOptions.axis]), shape, np.int32)
    if place.name == "EMBEDDING_LOOKUP" and slot == 0:
        return random.integers(0, int(shapes[1][0]), shape, np.int32)
    return random.integers(0, 8, shape, np.int32)
