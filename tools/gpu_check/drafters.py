"""Bundles whose drafter drafts badly: what the target says must not change by it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from mtp_export.formats.tflite.gpu_table import read_graph
from mtp_runtime.bundle.litertlm import read_sections
from mtp_runtime.errors import BundleError

_NUMPY: dict[int, Any] = {
    schema.TensorType.INT8: np.int8,
    schema.TensorType.INT4: np.uint8,  # two to a byte
    schema.TensorType.INT32: np.int32,
    schema.TensorType.FLOAT32: np.float32,
}
DRAFTERS = ("exported", "clusters shuffled", "noise")


def with_drafter(path: Path, drafter: str, output: Path, seed: int = 0) -> Path:
    """A `.litertlm` with its drafter's weights changed in place: the places of tokens shuffled, or all of its matrices
    drawn anew. "exported" is the file as it is.

    Raises:
        BundleError: it has no drafter with such weights.
    """
    if drafter == "exported":
        return path
    shutil.copyfile(path, output)
    with output.open("r+b") as file:
        section = next(s for s in read_sections(file) if s.model_type == "tf_lite_mtp_drafter")
        file.seek(section.begin)
        graph = read_graph(file.read(section.end - section.begin), f"the drafter of {path.name}")
        random = np.random.default_rng(seed)
        done: set[int] = set()
        for subgraph in graph.model.subgraphs:
            for operator in subgraph.operators:
                tensor = subgraph.tensors[int(operator.inputs[-2 if len(operator.inputs) == 3 else -1])]
                buffer = graph.model.buffers[tensor.buffer]
                if tensor.buffer in done or not _is_wanted(graph.name_of(operator), tensor, drafter, graph):
                    continue
                done.add(tensor.buffer)
                data = np.frombuffer(graph.constant(tensor) or b"", _NUMPY[tensor.type])
                changed = random.permutation(data) if drafter != "noise" else _noise(data, random)
                file.seek(section.begin + buffer.offset)
                file.write(changed.astype(data.dtype).tobytes())
    if not done:
        raise BundleError(f"{path.name}: its drafter cannot be changed to {drafter!r}: export with --delegate gpu")
    return output


def _noise(data: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
    if data.dtype == np.int8:
        return random.integers(-127, 128, data.shape, np.int8)
    if data.dtype == np.uint8:
        return random.integers(0, 256, data.shape, np.uint8)
    drawn: NDArray[Any] = random.standard_normal(data.shape, np.float32) * data.std()
    return drawn


def _is_wanted(name: str, tensor: Any, drafter: str, graph: Any) -> bool:
    if not graph.is_constant(tensor):
        return False
    if drafter == "noise":
        return name == "FULLY_CONNECTED" and tensor.type in _NUMPY and tensor.type != schema.TensorType.INT32
    return name == "GATHER" and bytes(tensor.name).endswith(b"token_places")
