"""The weights of a finished `.tflite`, by the names of the checkpoint's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from mtp_export.weights.stored import StoredWeight, plain_rows, scaled_rows, stored_weight

_BITS = {schema.TensorType.INT8: 8, schema.TensorType.INT4: 4, schema.TensorType.INT2: 2}
_FLOATS = {schema.TensorType.FLOAT32: np.float32, schema.TensorType.INT32: np.int32}


def read_weights(path: Path) -> dict[str, StoredWeight]:
    """Return every weight of a graph by name; rows are read from the file when they are needed."""
    data = np.memmap(path, np.uint8, mode="r")
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
                weight = _weight(data, model, subgraph, tensor, buffer)
                if weight is not None:
                    weights[name] = weight
    return weights


def _weight(data: NDArray[np.uint8], model: Any, subgraph: Any, tensor: Any, buffer: Any) -> StoredWeight | None:
    shape = tuple(int(n) for n in tensor.ShapeAsNumpy())
    content = data[buffer.Offset() : buffer.Offset() + buffer.Size()]
    if tensor.Type() in _FLOATS:
        return stored_weight(shape, 32, plain_rows(content.view(_FLOATS[tensor.Type()]), shape))
    bits = _BITS.get(tensor.Type())
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
    return stored_weight(shape, bits, scaled_rows(content, shape, bits, scales, 0))
