"""The clustered head of a bundle's drafter by itself, cut out of its graph so that it can be timed."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mtp_runtime.backends.litert.quiet import native_log_held_back
from mtp_runtime.bundle.bundle import Bundle
from mtp_runtime.errors import BundleError

_IN_TFLITE = re.compile(rb"\d+\.head/")  # as formats/tflite names the tensors of a call of the head
_IN_ONNX = "drafter/head/"  # as formats/onnx names the nodes of one


@contextlib.contextmanager
def head_alone(bundle: Bundle, *, threads: int) -> Iterator[Callable[[], object]]:
    """Yield a function that runs the head once, with the final norm before it and post_projection, over random numbers.

    Raises:
        BundleError: the drafter's graph has no part of that name.
    """
    path = bundle.path("drafter")
    with tempfile.TemporaryDirectory(prefix="mtp-head-") as folder:
        if bundle.manifest.export_format == "onnx":
            yield _open_onnx(path, Path(folder))
            return
        with native_log_held_back():
            parts = _open_tflite(path, Path(folder), threads)
        try:
            yield lambda: parts[0].run_by_index(0, *parts[1:])
        finally:
            with native_log_held_back():
                parts.clear()


def _fail(path: Path) -> BundleError:
    return BundleError(f"{path} has no head that could be cut out: export the bundle again with this version")


def _open_tflite(path: Path, folder: Path, threads: int) -> list[Any]:
    """Return the compiled model, its input and its output buffers; a drafter that may hold back drafts here."""
    from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, HardwareAccelerator, Options

    cut = folder / "head.tflite"
    content, width = _cut_tflite(path)
    cut.write_bytes(content)
    options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=CpuOptions(num_threads=threads))
    model = CompiledModel.from_file(str(cut), options=options)
    inputs, outputs = model.create_input_buffers(0), model.create_output_buffers(0)
    inputs[0].write(np.random.default_rng(0).standard_normal(width, np.float32))
    for drafts in inputs[1:]:
        drafts.write(np.ones(1, np.int32))
    return [model, inputs, outputs]


def _cut_tflite(path: Path) -> tuple[bytes, int]:
    """Return the file with the head's operators alone, and how many values its first input has. A second one is there
    in a drafter that may hold back.

    Weights keep their places: the header is padded to the length that it had.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    data = path.read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data))
    entry = model.signatureDefs[0]
    subgraph = model.subgraphs[entry.subgraphIndex]
    tensors = subgraph.tensors
    outputs = {item.tensorIndex for item in entry.outputs}
    kept = [o for o in subgraph.operators if all(_IN_TFLITE.match(tensors[int(i)].name) for i in o.outputs)]
    made = {int(i) for operator in kept for i in operator.outputs}
    read = {int(i) for operator in kept for i in operator.inputs if i >= 0} - made
    fed = [i for i in read if tensors[i].buffer == 0 or _is_empty(model.buffers[tensors[i].buffer])]
    fed.sort(key=lambda i: tensors[i].type)  # floats are the first type
    if not fed or [tensors[i].type for i in fed][1:] not in ([], [schema.TensorType.INT32]) or not made & outputs:
        raise _fail(path)
    subgraph.operators = kept
    entry.inputs = [_tensor_map(schema, name, i) for name, i in zip((b"x", b"drafts"), fed, strict=False)]
    entry.outputs = [item for item in entry.outputs if item.tensorIndex in made]
    subgraph.inputs = np.array(fed, np.int32)
    subgraph.outputs = np.array([item.tensorIndex for item in entry.outputs], np.int32)
    entry.subgraphIndex, model.subgraphs, model.signatureDefs = 0, [subgraph], [entry]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    header, start = bytes(builder.Output()), min(b.offset for b in model.buffers if b.offset > 1)
    if len(header) > start:
        raise _fail(path)
    return header + b"\0" * (start - len(header)) + data[start:], int(np.prod(tensors[fed[0]].shape))


def _is_empty(buffer: Any) -> bool:
    return buffer.offset <= 1 and (buffer.data is None or len(buffer.data) == 0)


def _tensor_map(schema: Any, name: bytes, index: int) -> Any:
    item = schema.TensorMapT()
    item.name, item.tensorIndex = name, index
    return item


def _open_onnx(path: Path, folder: Path) -> Callable[[], object]:
    import onnx

    from mtp_runtime.backends.onnx.opening import open_graph

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    kept = [node for node in graph.node if node.name.startswith(_IN_ONNX)]
    made = {name for node in kept for name in node.output}
    known = {tensor.name for tensor in graph.initializer}
    fed = sorted({name for node in kept for name in node.input} - made - known - {""})
    outputs = [value for value in graph.output if value.name in made]
    if len(fed) != 1 or not outputs:
        raise _fail(path)
    (norm,) = (tensor for tensor in graph.initializer if tensor.name == "model.norm.weight")
    width = norm.dims[0]
    used = {name for node in kept for name in node.input}
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    x = onnx.helper.make_tensor_value_info(fed[0], onnx.TensorProto.FLOAT, [1, 1, width])
    model.graph.CopyFrom(onnx.helper.make_graph(kept, "head", [x], outputs, initializer=initializers))
    cut = folder / "head.onnx"
    cut.write_bytes(model.SerializeToString())
    data = path.with_name(f"{path.name}.data")
    shutil.copyfile(data, folder / data.name)  # a fiftieth of a bundle; a link out of its folder would be refused
    session = open_graph(cut, threads=1)  # on the threads of the opened bundle
    feed = {fed[0]: np.random.default_rng(0).standard_normal((1, 1, width), np.float32)}
    return lambda: session.run(None, feed)
