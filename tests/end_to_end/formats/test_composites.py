"""What `--composites` makes of a graph: fewer operators, and on the CPU the same bits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from mtp_export.formats.tflite.chain import LoweredGraph
from mtp_export.formats.tflite.gpu_table import Graph, open_graph
from mtp_export.formats.tflite.passes.composites import with_composites
from mtp_runtime.bundle.contract import PARAM_TENSOR, param_tensor
from mtp_runtime.errors import BundleError
from tests.conftest import Export, run_cli
from tests.support.operators import operator_counts

CACHES = ("STABLEHLO_COMPOSITE odml.cache_update", "STABLEHLO_COMPOSITE odml.runtime_bmm")
KEPT = ("FULLY_CONNECTED", "SOFTMAX", "GELU", *CACHES)


@pytest.fixture(scope="module")
def targets(export_nano: Export) -> tuple[Path, Path]:
    """The target without composites and with them."""
    composed = export_nano("int8", export_format="tflite-composites")
    return export_nano("int8", export_format="tflite-gpu") / "target.tflite", composed / "target.tflite"


def run(path: Path, signature: str) -> dict[str, np.ndarray]:
    runner = Interpreter(str(path)).get_signature_runner(signature)
    random = np.random.default_rng(3)
    inputs = {}
    for name, tensor in sorted(runner.get_input_details().items()):
        shape, dtype = tensor["shape"], tensor["dtype"]
        if name == PARAM_TENSOR:
            inputs[name] = param_tensor(300, 305)
        elif name == "input_pos":
            inputs[name] = np.arange(300, 300 + shape[0], dtype=dtype)
        else:
            inputs[name] = random.standard_normal(shape, dtype=np.float32)
    outputs: dict[str, np.ndarray] = runner(**inputs)
    return outputs


def test_a_gpu_takes_them_and_a_cpu_bundle_has_none(targets: tuple[Path, Path]) -> None:
    done = run_cli("inspect", str(targets[1].parent), "--json")
    assert json.loads(done.stdout)["wholly_delegated"] is True
    refused = run_cli("export", "--model", "nano", "--composites", "--output", "unused", check=False)
    assert (refused.returncode, "--composites is for --delegate gpu, got --delegate cpu" in refused.stderr) == (2, True)


@pytest.mark.parametrize("signature", ["decode", "verify"])
def test_the_bits_are_the_same_with_fewer_operators(targets: tuple[Path, Path], signature: str) -> None:
    plain, composed = (operator_counts(open_graph(path), signature) for path in targets)
    assert composed["STABLEHLO_COMPOSITE odml.rms_norm"] == plain["RSQRT"] > 70
    assert not {"RSQRT", "MEAN"} & set(composed)
    assert plain["CONCATENATION"] - composed["CONCATENATION"] == composed["GATHER"] - plain["GATHER"] > 10
    assert [plain[name] for name in KEPT] == [composed[name] for name in KEPT]
    assert composed.total() < 0.6 * plain.total()

    expected, found = (run(path, signature) for path in targets)
    assert float(np.std(expected["logits"])) > 0.1
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


Step = tuple[str, list[str], str]
SHAPES = {"x": [1, 4], "square": [1, 4], "mean": [1, 1], "sum": [1, 1], "root": [1, 1], "out": [1, 4]}
VALUES = {
    "axis": np.array([1], np.int32),
    "epsilon": np.array(1e-6, np.float32),
    "w": np.arange(1, 5, dtype=np.float32),
}


def norm(
    x: str = "x", to: str = "out", scope: str = "", mean: str = "MEAN", square: str = "", axis: str = "axis"
) -> list[Step]:
    """The steps of x / rms(x)."""
    names = [f"{scope}{name}" for name in ("square", "mean", "sum", "root")]
    return [
        ("MUL", [x, square or x], names[0]),
        (mean, [names[0], axis], names[1]),
        ("ADD", [names[1], "epsilon"], names[2]),
        ("RSQRT", [names[2]], names[3]),
        ("MUL", [x, names[3]], to),
    ]


def model_of(steps: list[Step], outputs: list[str], *, fused: bool = False, **values: np.ndarray) -> schema.ModelT:
    """A model with a signature; `fused` clamps what the last step gives."""
    constants = VALUES | values
    shapes = {name: list(value.shape) for name, value in constants.items()} | {"x": SHAPES["x"]}
    shapes |= {output: SHAPES[output.rpartition("/")[2]] for _, _, output in steps}
    places = {name: number for number, name in enumerate(shapes)}
    model, subgraph, entry = schema.ModelT(), schema.SubGraphT(), schema.SignatureDefT()
    model.version, model.buffers, model.operatorCodes, model.subgraphs = 3, [schema.BufferT()], [], [subgraph]
    subgraph.tensors, subgraph.operators = [], []
    for name, shape in shapes.items():
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.hasRank, tensor.buffer = name.encode(), np.array(shape, np.int32), True, 0
        if name in constants:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(constants[name].tobytes(), np.uint8)
            tensor.buffer = len(model.buffers)
            tensor.type = schema.TensorType.INT32 if constants[name].dtype == np.int32 else schema.TensorType.FLOAT32
            model.buffers.append(buffer)
        subgraph.tensors.append(tensor)
    for name, inputs, output in steps:
        code, operator = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, name)
        operator.opcodeIndex = len(model.operatorCodes)
        operator.inputs = np.array([places[i] for i in inputs], np.int32)
        operator.outputs = np.array([places[output]], np.int32)
        if name in ("MEAN", "SUM"):
            operator.builtinOptions, operator.builtinOptionsType = schema.ReducerOptionsT(), 27
            operator.builtinOptions.keepDims = True
        if name in ("MUL", "ADD"):
            kind = f"{name.capitalize()}Options"
            operator.builtinOptions = getattr(schema, f"{kind}T")()
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        model.operatorCodes.append(code)
        subgraph.operators.append(operator)
    if fused:
        subgraph.operators[-1].builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.RELU
    subgraph.inputs = np.array([places["x"]], np.int32)
    subgraph.outputs = np.array([places[name] for name in outputs], np.int32)
    entry.signatureKey, entry.subgraphIndex = b"norms", 0
    entry.inputs, entry.outputs = ([_item(places, name) for name in names] for names in (["x"], outputs))
    model.signatureDefs = [entry]
    return model


def _item(places: dict[str, int], name: str) -> schema.TensorMapT:
    item = schema.TensorMapT()
    item.name, item.tensorIndex = name.encode(), places[name]
    return item


def composed(model: schema.ModelT) -> Counter[str]:
    with_composites(LoweredGraph(role="target", model=model, weights={}))
    return Counter(operator.name for operator in Graph(model=model, content=b"").operators())


@pytest.mark.parametrize(
    ("steps", "outputs", "fused", "composites"),
    [
        (norm(), ["out"], False, 1),
        (norm(mean="SUM"), ["out"], False, 0),
        (norm(square="w"), ["out"], False, 0),
        (norm(axis="first"), ["out"], False, 0),
        (norm(), ["out", "root"], False, 0),
        (norm(), ["out"], True, 0),
    ],
    ids=["norm", "a sum", "another product", "another axis", "used twice", "clamped"],
)
def test_only_a_norm_becomes_a_composite(steps: list[Step], outputs: list[str], fused: bool, composites: int) -> None:
    model = model_of(steps, outputs, fused=fused, first=np.array([0], np.int32))
    operators = composed(model)
    assert operators["STABLEHLO_COMPOSITE"] == composites
    assert operators["RSQRT"] == 1 - composites
    if composites:
        assert len(model.subgraphs[0].tensors) == 3  # x, ones and the result


def test_norms_with_a_weight_and_without_share_no_parts(tmp_path: Path) -> None:
    """The one without comes first: its parts leave the weight alone."""
    weighted = [*norm(to="b/x", scope="b/"), ("MUL", ["b/x", "w"], "b/out")]
    steps = [*norm(to="a/out", scope="a/"), *weighted]
    x = np.array([[1, 2, 3, 5]], np.float32)
    found = []
    for number, rewritten in enumerate((False, True)):
        model = model_of(steps, ["a/out", "b/out"])
        if rewritten:
            assert composed(model)["STABLEHLO_COMPOSITE"] == 2
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        path = tmp_path / f"{number}.tflite"
        path.write_bytes(bytes(builder.Output()))
        found.append(Interpreter(str(path)).get_signature_runner("norms")(x=x))
    np.testing.assert_array_equal(found[0]["b/out"], found[0]["a/out"] * VALUES["w"])
    for name in ("a/out", "b/out"):
        np.testing.assert_array_equal(found[0][name], found[1][name])


@pytest.mark.parametrize(("part", "named"), [(1, False), (99, True), (-1, True), (0, True)])
def test_a_damaged_composite_is_one_line(part: int, named: bool) -> None:
    model = model_of(norm(), ["out"])
    composed(model)
    (composite,) = model.subgraphs[0].operators
    composite.builtinOptions2.decompositionSubgraphIndex = part
    if not named:
        composite.builtinOptions2 = None
    with pytest.raises(BundleError, match=r"damaged, export it again$"):
        list(Graph(model=model, content=b"").operators())


def test_a_stranger_s_name_is_written_out() -> None:
    model = model_of(norm(), ["out"])
    composed(model)
    model.subgraphs[0].operators[0].builtinOptions2.name = b"\x1b[31m\n"
    (operator,) = Graph(model=model, content=b"").operators()
    assert operator.form.startswith(r"STABLEHLO_COMPOSITE \x1b[31m\n(")
