"""The weights of a finished ONNX graph, by the names of the checkpoint's parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from mtp_export.weights.stored import StoredWeight, plain_rows, scaled_rows, stored_weight


def read_weights(path: Path) -> dict[str, StoredWeight]:
    """Return every weight of a graph by name; rows are read from the file when they are needed."""
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
            weights[own] = stored_weight(shape, bits, scaled_rows(content(name), shape, bits, scales, 1 << (bits - 1)))
        else:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            shape = tuple(tensor.dims)
            weights[name] = stored_weight(shape, 8 * dtype.itemsize, plain_rows(content(name).view(dtype), shape))
    return weights
