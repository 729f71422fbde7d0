"""The weights that lie in a bundle's graphs, by the names of the checkpoint's parameters, turned back into float32."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from mtp_export.weights.parameter import Parameter
from mtp_export.weights.recipes import FLOAT32
from mtp_runtime import Bundle
from mtp_runtime.bundle.contract import GRAPH_ROLES

_TFLITE_BITS = {schema.TensorType.INT8: 8, schema.TensorType.INT4: 4, schema.TensorType.INT2: 2}
_TFLITE_FLOATS = {schema.TensorType.FLOAT32: np.float32, schema.TensorType.INT32: np.int32}

_TABLE, _ROW_SCALES = "masked_embedding.table", "masked_embedding.row_scales"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A parameter as a graph has it: how many bits a value takes, and the weights that it stands for."""

    bits: int
    parameter: Parameter


def stored_weights(bundle: Bundle) -> dict[str, dict[str, StoredWeight]]:
    """Return every weight of every graph, by role and name; rows are read from the files when they are needed."""
    read = _of_onnx if bundle.manifest.export_format == "onnx" else _of_tflite
    return {role: read(bundle, role) for role in GRAPH_ROLES}


def unpacked(data: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Return signed values of which several lie in a byte, the first in the low bits. Shapes: [N*bits/8] -> [N]"""
    if bits == 8:
        return data.view(np.int8)
    per_byte = 8 // bits
    # Shifted to the top of the byte and back, so that the sign comes along.
    parts = [((data << np.uint8(8 - bits * (i + 1))).view(np.int8) >> np.int8(8 - bits)) for i in range(per_byte)]
    return np.stack(parts, -1).reshape(-1)


def _stored(shape: tuple[int, ...], bits: int, rows: Callable[[int, int], NDArray[Any]]) -> StoredWeight:
    return StoredWeight(bits=bits, parameter=Parameter(shape=shape, format=FLOAT32, rows=rows))


def _scaled(
    data: NDArray[np.uint8], shape: tuple[int, ...], bits: int, scales: NDArray[np.float32], zero: int
) -> Callable[[int, int], NDArray[np.float32]]:
    """Return a reader of rows of quantised values. Shapes: data [R*C*bits/8], scales [R,blocks], or [1,1] for all."""
    columns = math.prod(shape[1:])
    row_bytes = columns * bits // 8

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        packed = data[start * row_bytes : stop * row_bytes]
        if zero:  # unsigned, with the zero in the middle
            packed = packed ^ np.uint8(sum(zero << (bits * i) for i in range(8 // bits)))
        values = unpacked(packed, bits).astype(np.float32)
        factors = scales if len(scales) == 1 else scales[start:stop]
        scaled: NDArray[np.float32] = values.reshape(stop - start, factors.shape[1], -1) * factors[..., None]
        return scaled.reshape(stop - start, *shape[1:])

    return rows


def _plain(values: NDArray[Any], shape: tuple[int, ...]) -> Callable[[int, int], NDArray[Any]]:
    shaped = values.reshape(shape)
    return lambda start, stop: np.array(shaped[start:stop])


def _of_tflite(bundle: Bundle, role: str) -> dict[str, StoredWeight]:
    data = np.memmap(bundle.path(role), np.uint8, mode="r")
    model = schema.Model.GetRootAs(data, 0)
    weights: dict[str, StoredWeight] = {}
    for i in range(model.SubgraphsLength()):
        subgraph = model.Subgraphs(i)
        for j in range(subgraph.TensorsLength()):
            tensor = subgraph.Tensors(j)
            name = tensor.Name().decode()
            buffer = model.Buffers(tensor.Buffer())
            # What is computed has no buffer, what belongs to a segment has a path for a name; scales of blocks come
            # after the weight that they belong to.
            known = name in weights or name.removesuffix("_scales") in weights
            if not known and "/" not in name and buffer.Size() > 1:
                weight = _tflite_weight(data, model, subgraph, tensor, buffer)
                if weight is not None:
                    weights[name] = weight
    return weights


def _tflite_weight(data: NDArray[np.uint8], model: Any, subgraph: Any, tensor: Any, buffer: Any) -> StoredWeight | None:
    shape = tuple(int(n) for n in tensor.ShapeAsNumpy())
    content = data[buffer.Offset() : buffer.Offset() + buffer.Size()]
    if tensor.Type() in _TFLITE_FLOATS:
        return _stored(shape, 32, _plain(content.view(_TFLITE_FLOATS[tensor.Type()]), shape))
    bits = _TFLITE_BITS.get(tensor.Type())
    quantisation = tensor.Quantization()
    if bits is None or quantisation is None:
        return None
    if quantisation.DetailsType() == schema.QuantizationDetails.BlockwiseQuantization:
        details = schema.BlockwiseQuantization()
        table = quantisation.Details()
        details.Init(table.Bytes, table.Pos)
        of_scales = subgraph.Tensors(details.Scales())
        place = model.Buffers(of_scales.Buffer())
        raw = data[place.Offset() : place.Offset() + place.Size()].view(np.float16)
        scales = raw.astype(np.float32).reshape(shape[0], -1)
    else:
        scales = np.asarray(quantisation.ScaleAsNumpy(), np.float32).reshape(-1, 1)
    return _stored(shape, bits, _scaled(content, shape, bits, scales, 0))


def _of_onnx(bundle: Bundle, role: str) -> dict[str, StoredWeight]:
    import onnx  # of bundles for LiteRT nobody needs it

    path = bundle.path(role)
    graph = onnx.load(str(path), load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.data_location}
    columns = {
        node.input[i]: attributes
        for node in graph.node
        for i, value in enumerate(node.input)
        if value.endswith(".quantised")
        for attributes in [{a.name: a.i for a in node.attribute}]
    }

    def content(name: str) -> NDArray[np.uint8]:
        place = {entry.key: entry.value for entry in tensors[name].external_data}
        file: Path = path.with_name(place["location"])
        start, length = int(place["offset"]), int(place["length"])
        return np.memmap(file, np.uint8, mode="r", offset=start, shape=(length,))

    weights: dict[str, StoredWeight] = {}
    for name, tensor in tensors.items():
        if name.endswith(".scales"):
            continue
        if name.endswith(".quantised"):
            bits = columns[name]["bits"]
            own = name.removesuffix(".quantised")
            rows = tensor.dims[0]
            scales = content(f"{own}.scales").view(np.float32).reshape(rows, -1)
            shape = (rows, len(content(name)) * 8 // bits // rows)
            weights[own] = _stored(shape, bits, _scaled(content(name), shape, bits, scales, 1 << (bits - 1)))
        else:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            shape = tuple(tensor.dims)
            bits = 32 if dtype != np.float16 else 16
            weights[name] = _stored(shape, bits, _plain(content(name).view(dtype), shape))
    return weights


def as_values(stored: Mapping[str, StoredWeight]) -> dict[str, Parameter]:
    """Return the weights without the numbers of bits that they are stored in."""
    return {name: weight.parameter for name, weight in stored.items()}


def with_row_scales(stored: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """Return a drafter's weights with the scales of the clustered table's rows, which lie apart, multiplied into it."""
    rest = dict(stored)
    scales = rest.pop(_ROW_SCALES, None)
    if scales is None:
        return rest
    table, factors = rest[_TABLE].parameter, scales.parameter

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        by_token = table.rows(start, stop).reshape(stop - start, factors.shape[1], -1)
        scaled: NDArray[np.float32] = by_token * factors.rows(start, stop)[..., None]
        return scaled.reshape(stop - start, -1)

    rest[_TABLE] = _stored(table.shape, rest[_TABLE].bits, rows)
    return rest
