"""What `--composites` makes of a graph: fewer operators, and on the CPU the same bits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from mtp_export.composites import with_composites
from mtp_export.delegation import Graph, open_graph
from mtp_export.lower.tflite import LoweredGraph
from tests.conftest import Export, run_cli
from tools.gpu_check.passes import write_alone

KEPT = ("FULLY_CONNECTED", "BATCH_MATMUL", "SOFTMAX", "DYNAMIC_UPDATE_SLICE", "GELU")


@pytest.fixture(scope="module")
def targets(export_nano: Export) -> tuple[Path, Path]:
    """The target without composites and with them."""
    composed = export_nano("int8", export_format="tflite-composites")
    return export_nano("int8") / "target.tflite", composed / "target.tflite"


def counts(graph: Graph, signature: str) -> Counter[str]:
    number = graph.signature_names().index(signature)
    return Counter(operator.form.partition("(")[0] for operator in graph.operators() if operator.subgraph == number)


def run(path: Path, signature: str) -> dict[str, np.ndarray]:
    runner = Interpreter(str(path)).get_signature_runner(signature)
    random = np.random.default_rng(3)
    inputs = {}
    for name, tensor in sorted(runner.get_input_details().items()):
        shape, dtype = tensor["shape"], tensor["dtype"]
        inputs[name] = np.arange(300, 300 + shape[0], dtype=dtype) if name == "input_pos" else None
        if inputs[name] is None:
            inputs[name] = random.standard_normal(shape, dtype=np.float32)
    outputs: dict[str, np.ndarray] = runner(**inputs)
    return outputs


def test_a_gpu_takes_them_and_a_cpu_bundle_has_none(targets: tuple[Path, Path]) -> None:
    done = run_cli("inspect", str(targets[1].parent), "--json")
    assert json.loads(done.stdout)["wholly_delegated"] is True
    refused = run_cli("export", "--model", "nano", "--composites", "--output", "unused", check=False)
    assert (refused.returncode, "--composites is for --delegate gpu, got --delegate cpu" in refused.stderr) == (2, True)


@pytest.mark.parametrize("signature", ["decode", "verify"])
def test_the_bits_are_the_same_with_fewer_operators(targets: tuple[Path, Path], signature: str, tmp_path: Path) -> None:
    plain, composed = (counts(open_graph(path), signature) for path in targets)
    assert composed["STABLEHLO_COMPOSITE odml.rms_norm"] == plain["RSQRT"] > 70
    assert not {"RSQRT", "MEAN"} & set(composed)
    assert plain["CONCATENATION"] - composed["CONCATENATION"] == composed["GATHER"] - plain["GATHER"] > 10
    assert [plain[name] for name in KEPT] == [composed[name] for name in KEPT]
    assert composed.total() < 0.6 * plain.total()

    apart = tmp_path / "apart.tflite"
    write_alone(open_graph(targets[1]), targets[1], signature, apart)
    assert "RSQRT" in counts(open_graph(apart), signature)
    expected, *others = (run(path, signature) for path in (*targets, apart))
    assert float(np.std(expected["logits"])) > 0.1
    for other in others:
        assert all(np.array_equal(expected[name], other[name]) for name in expected)


def norm(*, mean: str = "MEAN", uses: int = 1) -> schema.ModelT:
    """x / rms(x), with another operator in the place of its mean, or with a root that is used more than once."""
    shapes = {"x": [1, 4], "square": [1, 4], "mean": [1, 1], "sum": [1, 1], "root": [1, 1], "out": [1, 4]}
    shapes |= {"axes": [1], "epsilon": []}
    values = {"axes": np.array([1], np.int32), "epsilon": np.array(1e-6, np.float32)}
    steps = [("MUL", ["x", "x"], "square"), (mean, ["square", "axes"], "mean"), ("ADD", ["mean", "epsilon"], "sum")]
    steps += [("RSQRT", ["sum"], "root"), ("MUL", ["x", "root"], "out")]
    places = {name: number for number, name in enumerate(shapes)}
    model, subgraph = schema.ModelT(), schema.SubGraphT()
    model.buffers, model.operatorCodes, model.signatureDefs = [schema.BufferT()], [], []
    subgraph.tensors, subgraph.operators = [], []
    for name, shape in shapes.items():
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name.encode(), np.array(shape, np.int32), 0
        if name in values:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(values[name].tobytes(), np.uint8)
            tensor.buffer = len(model.buffers)
            model.buffers.append(buffer)
        subgraph.tensors.append(tensor)
    for name, inputs, output in steps:
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(model.operatorCodes)
        operator.inputs = np.array([places[i] for i in inputs], np.int32)
        operator.outputs = np.array([places[output]], np.int32)
        model.operatorCodes.append(code)
        subgraph.operators.append(operator)
    subgraph.inputs = np.array([places["x"]], np.int32)
    subgraph.outputs = np.array([places["out"], places["root"]][:uses], np.int32)
    model.subgraphs = [subgraph]
    return model


@pytest.mark.parametrize(
    ("model", "composites"), [(norm(), 1), (norm(mean="SUM"), 0), (norm(uses=2), 0)], ids=["norm", "sum", "used twice"]
)
def test_only_a_norm_becomes_a_composite(model: schema.ModelT, composites: int) -> None:
    with_composites(LoweredGraph(role="target", model=model, weights={}))
    forms = Counter(operator.name for operator in Graph(model=model, content=b"").operators())
    assert forms["STABLEHLO_COMPOSITE"] == composites
    assert forms["RSQRT"] == 1 - composites
    assert len(model.subgraphs[0].tensors) == (3 if composites else 8)  # x, ones and the result
