"""Quantised weights against ai-edge-quantizer's, byte for byte, and the file that they are written to."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_quantizer import qtyping, quantizer, recipe
from numpy.typing import NDArray

from mtp_export.arch.published import NANO
from mtp_export.errors import CheckpointError
from mtp_export.formats.onnx import convert as lower_onnx
from mtp_export.formats.onnx.write import write_onnx
from mtp_export.formats.tflite import chain as tflite
from mtp_export.formats.tflite.write import _QUANTISED_TYPES, write_graph
from mtp_export.graph.ir import TracedGraph
from mtp_export.graph.static import trace_embedder
from mtp_export.source.stored_integers import Rows
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.quantise import pack, quantise
from mtp_export.weights.recipes import FLOAT32, INT4, INT8, WeightFormat
from tests.support.small_graphs import feed_forward_graph, random_parameters
from tools.synthesize.values import pack_words

BLOCKS = WeightFormat(bits=4, block_size=32)


@pytest.fixture(scope="module")
def graphs() -> list[TracedGraph]:
    """A feed-forward block (FULLY_CONNECTED) and an embedder (EMBEDDING_LOOKUP)."""
    return [feed_forward_graph(), trace_embedder(NANO.target, "embedder")]


@pytest.fixture(scope="module")
def lowered(graphs: list[TracedGraph]) -> list[tflite.LoweredGraph]:
    """Both graphs, lowered; copy one before writing, which consumes it."""
    return tflite.lower(graphs, workers=2)


@pytest.fixture(scope="module")
def written(
    graphs: list[TracedGraph], lowered: list[tflite.LoweredGraph], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, WeightFormat], Path]:
    """Both graphs, in every format, from the same random weights."""
    folder = tmp_path_factory.mktemp("graphs")
    paths = {}
    for format in (FLOAT32, INT8, INT4, BLOCKS):
        for graph, one in zip(graphs, lowered, strict=True):
            path = folder / f"{graph.role}-{format.bits}-{format.block_size}.tflite"
            write_graph(copy.deepcopy(one), random_parameters(graph, format), path)
            paths[graph.role, format] = path
    return paths


def read_model(data: bytes) -> schema.ModelT:
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(data))


def weights_of(data: bytes) -> dict[bytes, tuple[bytes, NDArray[np.float32]]]:
    """Bytes and scales of every quantised constant, by name; blocks' scales are looked up."""
    model, weights = read_model(data), {}

    def contents(tensor: schema.TensorT) -> bytes:
        buffer = model.buffers[tensor.buffer]
        if buffer.offset > 1:
            return data[buffer.offset : buffer.offset + buffer.size]
        return bytes(np.asarray(buffer.data, np.uint8)) if buffer.data is not None else b""

    for subgraph in model.subgraphs:
        for tensor in subgraph.tensors:
            quantisation = tensor.quantization
            if tensor.type not in _QUANTISED_TYPES.values() or tensor.buffer == 0:
                continue
            if quantisation.detailsType == schema.QuantizationDetails.BlockwiseQuantization:
                scales = np.frombuffer(contents(subgraph.tensors[quantisation.details.scales]), np.float16)
            else:
                scales = np.asarray(quantisation.scale)
            if data_bytes := contents(tensor):
                weights[tensor.name] = data_bytes, scales.astype(np.float32)
    return weights


@pytest.mark.parametrize("format", [INT8, INT4, BLOCKS], ids=["int8", "int4", "int4 blocks"])
@pytest.mark.parametrize("role", ["feed_forward", "embedder"])
def test_equal_to_ai_edge_quantizer(
    written: dict[tuple[str, WeightFormat], Path], role: str, format: WeightFormat
) -> None:
    plans = {INT8: recipe.dynamic_wi8_afp32, INT4: recipe.dynamic_wi4_afp32}
    tool = quantizer.Quantizer(str(written[role, FLOAT32]))
    if format == BLOCKS:
        tool.add_dynamic_config(
            regex=".*",
            operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
            num_bits=4,
            granularity=qtyping.QuantGranularity.BLOCKWISE_32,
        )
    else:
        tool.load_quantization_recipe(plans[format]())
    theirs = weights_of(bytes(tool.quantize().quantized_model))
    ours = weights_of(written[role, format].read_bytes())
    assert set(ours) == set(theirs)
    assert len(ours) == {"feed_forward": 3, "embedder": 1}[role]
    for name, (data, scales) in ours.items():
        assert data == theirs[name][0], name
        np.testing.assert_array_equal(scales, theirs[name][1].reshape(-1), err_msg=str(name))


def test_rows_in_pieces_give_the_same_file(
    graphs: list[TracedGraph],
    lowered: list[tflite.LoweredGraph],
    written: dict[tuple[str, WeightFormat], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is held in memory at a time must not show in the bytes."""
    monkeypatch.setattr("mtp_export.weights.parameter._BLOCK_BYTES", 4096)
    write_graph(copy.deepcopy(lowered[1]), random_parameters(graphs[1], INT8), tmp_path / "pieces.tflite")
    assert (tmp_path / "pieces.tflite").read_bytes() == written["embedder", INT8].read_bytes()


def test_a_parameter_without_data_is_an_error(lowered: list[tflite.LoweredGraph], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"embed_tokens\.weight"):
        write_graph(copy.deepcopy(lowered[1]), {}, tmp_path / "none.tflite")


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_pack_puts_the_first_value_low(bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = np.array([[low, high, 0, 1, -1, high, low, 0]], np.int8)
    packed = pack(values, bits)
    unpacked = [(int(byte) >> (bits * i)) & (2**bits - 1) for byte in packed for i in range(8 // bits)]
    assert [v - 2**bits if v > high else v for v in unpacked] == values[0].tolist()


def test_quantise_bounds_the_error_by_half_a_step() -> None:
    rows = np.random.default_rng(0).standard_normal((16, 64), np.float32)
    for format in (INT8, INT4):
        values, scales = quantise(rows, format)
        assert np.abs(values * scales - rows).max() <= 0.5001 * scales.max()
    assert np.array_equal(quantise(np.zeros((2, 8), np.float32), INT8)[0], np.zeros((2, 8), np.int8))


def test_parameter_of_another_shape_is_an_error(
    graphs: list[TracedGraph], lowered: list[tflite.LoweredGraph], tmp_path: Path
) -> None:
    wrong = {
        name: Parameter(shape=(3, 3), format=INT8, rows=lambda a, b: np.zeros((b - a, 3), np.float32))
        for name in graphs[1].weights
    }
    with pytest.raises(AssertionError, match="parameter"):
        write_graph(copy.deepcopy(lowered[1]), wrong, tmp_path / "wrong.tflite")


def test_run_in_torch_equals_the_graph(
    graphs: list[TracedGraph], written: dict[tuple[str, WeightFormat], Path]
) -> None:
    """The float file computes what the traced modules compute."""
    from ai_edge_litert.interpreter import Interpreter

    from mtp_export.graph.ir import run_signature

    for graph in graphs:
        traced = graph.signatures[0]
        parameters = random_parameters(graph, FLOAT32)
        weights = {n: torch.from_numpy(p.rows(0, p.shape[0])) for n, p in parameters.items()}
        generator = np.random.default_rng(1)
        inputs = {
            s.name: generator.integers(0, 100, s.fixed_shape).astype(np.int32)
            if s.dtype == "int32"
            else generator.standard_normal(s.fixed_shape).astype(np.float32)
            for s in traced.signature.inputs
        }
        expected = run_signature(graph, traced, weights, {n: torch.from_numpy(v) for n, v in inputs.items()})
        runner = Interpreter(str(written[graph.role, FLOAT32])).get_signature_runner(traced.signature.name)
        for name, value in runner(**inputs).items():
            np.testing.assert_allclose(value, expected[traced.outputs[name]].numpy(), atol=1e-5)


def stored_parameters(graph: TracedGraph, format: WeightFormat, scale: float = 0.01) -> dict[str, Parameter]:
    """Seeded integers and scales for every matrix, as a checkpoint has them; the scales are exact in float16."""

    def parameter(shape: tuple[int, ...], seed: int) -> Parameter:
        generator, high = np.random.default_rng(seed), 2 ** (format.bits - 1)
        values = generator.integers(-high, high, shape).astype(np.int8)
        groups = shape[1] // (format.block_size or shape[1])
        scales = (generator.uniform(1, 2, (shape[0], groups)) * scale).astype(np.float16).astype(np.float32)
        return Parameter(
            shape=shape,
            format=format,
            rows=lambda start, stop: Rows(values[start:stop], scales[start:stop]),
            stored=True,
            looked_up=graph.role == "embedder",
        )

    floats = random_parameters(graph, FLOAT32)
    return {n: parameter(s, i) if len(s) == 2 else floats[n] for i, (n, s) in enumerate(graph.weights.items())}


STORED = [WeightFormat(bits=b, block_size=size) for b, size in ((8, 0), (4, 0), (4, 32), (4, 128), (2, 0), (2, 32))]


@pytest.mark.parametrize("format", STORED, ids=str)
@pytest.mark.parametrize("number", [0, 1], ids=["products", "look-ups"])
def test_what_a_checkpoint_stores_lands_byte_for_byte(
    graphs: list[TracedGraph], lowered: list[tflite.LoweredGraph], number: int, format: WeightFormat, tmp_path: Path
) -> None:
    """In a .tflite values are signed: the stored words with the highest bit of every value turned round."""
    graph, path = graphs[number], tmp_path / "stored.tflite"
    parameters = stored_parameters(graph, format)
    write_graph(copy.deepcopy(lowered[number]), parameters, path)
    weights = weights_of(path.read_bytes())
    matrices = {name: p for name, p in parameters.items() if p.stored}
    assert {name.decode() for name in weights} == set(matrices)
    sign = sum(1 << i for i in range(format.bits - 1, 8, format.bits))
    for name, parameter in matrices.items():
        values, scales = parameter.rows(0, parameter.shape[0])
        data, written = weights[name.encode()]
        assert data == (pack_words(values, format.bits).view(np.uint8) ^ np.uint8(sign)).tobytes()
        np.testing.assert_array_equal(written, scales.reshape(-1))


@pytest.fixture(scope="module")
def lowered_for_onnx(graphs: list[TracedGraph]) -> list[lower_onnx.LoweredGraph]:
    return lower_onnx.lower(graphs, workers=1, portable=False)


@pytest.mark.parametrize("format", STORED, ids=str)
@pytest.mark.parametrize("number", [0, 1], ids=["products", "look-ups"])
def test_the_same_in_onnx_with_a_scale_repeated_for_each_block(
    graphs: list[TracedGraph],
    lowered_for_onnx: list[lower_onnx.LoweredGraph],
    number: int,
    format: WeightFormat,
    tmp_path: Path,
) -> None:
    """Its values are unsigned: the stored words as they are."""
    graph, path = graphs[number], tmp_path / "stored.onnx"
    parameters = stored_parameters(graph, format)
    write_onnx(copy.deepcopy(lowered_for_onnx[number]), parameters, path)
    data = (tmp_path / "stored.onnx.data").read_bytes()
    tensors = {
        t.name: (list(t.dims), data[int(e["offset"]) :][: int(e["length"])])
        for t in onnx.load(path, load_external_data=False).graph.initializer
        if (e := {entry.key: entry.value for entry in t.external_data})
    }
    for name, parameter in parameters.items():
        if not parameter.stored:
            continue
        values, scales = parameter.rows(0, parameter.shape[0])
        assert tensors[f"{name}.quantised"][1] == pack_words(values, format.bits).tobytes()
        dims, written = tensors[f"{name}.scales"]
        repeated = np.frombuffer(written, np.float32).reshape(*scales.shape, -1)
        assert dims[1] % scales.shape[1] == 0
        np.testing.assert_array_equal(repeated, np.broadcast_to(scales[..., None], repeated.shape))
    if number == 0:
        run_against_torch(graph, parameters, path)


def run_against_torch(graph: TracedGraph, parameters: dict[str, Parameter], path: Path) -> None:
    """ONNX Runtime multiplies what is stored; its activations are rounded to int8."""
    from mtp_export.graph.ir import run_signature
    from mtp_runtime.backends.onnx.opening import open_graph

    def restored(parameter: Parameter) -> torch.Tensor:
        rows = parameter.rows(0, parameter.shape[0])
        if isinstance(rows, Rows):
            rows = (rows.values.reshape(*rows.scales.shape, -1) * rows.scales[..., None]).reshape(parameter.shape)
        return torch.from_numpy(rows)

    traced, generator = graph.signatures[0], np.random.default_rng(1)
    inputs = {s.name: generator.standard_normal(s.fixed_shape).astype(np.float32) for s in traced.signature.inputs}
    weights = {name: restored(p) for name, p in parameters.items()}
    expected = run_signature(graph, traced, weights, {n: torch.from_numpy(v) for n, v in inputs.items()})
    (out,) = open_graph(path, threads=1).run(None, inputs)
    reference = expected[traced.outputs["out"]].numpy()
    assert np.abs(out - reference).max() < 0.05 * np.abs(reference).max()


def test_a_scale_that_blocks_cannot_have_is_refused(
    graphs: list[TracedGraph], lowered: list[tflite.LoweredGraph], tmp_path: Path
) -> None:
    parameters = stored_parameters(graphs[1], WeightFormat(bits=4, block_size=32), scale=2.0**-16)
    with pytest.raises(CheckpointError, match=r"is stored with a scale of .*take --format onnx"):
        write_graph(copy.deepcopy(lowered[1]), parameters, tmp_path / "tiny.tflite")
