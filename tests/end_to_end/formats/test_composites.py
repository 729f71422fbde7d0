"""What `--composites` makes of a graph: fewer operators, and on the CPU the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor, nn

from mtp_export.formats.tflite.chain import lower
from mtp_export.formats.tflite.gpu_table import Graph, open_graph
from mtp_export.formats.tflite.write import write_graph
from mtp_export.graph.builder import GraphBuilder
from mtp_export.graph.ir import TracedGraph, run_signature
from mtp_export.models.layers import RMSNorm
from mtp_export.weights.recipes import FLOAT32
from mtp_runtime.bundle.contract import PARAM_TENSOR, param_tensor
from mtp_runtime.errors import BundleError
from tests.conftest import Export, run_cli
from tests.support.operators import operator_counts
from tests.support.small_graphs import random_parameters

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

    expected, actual = (run(path, signature) for path in targets)
    assert float(np.std(expected["logits"])) > 0.1
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)


class Norms(nn.Module):
    """A norm with a weight and one without, of the same rows."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.scaled = RMSNorm(4, 1e-6, scale=False), RMSNorm(4, 1e-6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"plain": self.plain(x), "scaled": self.scaled(x)}


def norms_graph(shape: tuple[int, ...], calls: int) -> TracedGraph:
    """Norms traced with composites, called several times, each with the weight of its own number."""
    builder = GraphBuilder("norms", composites=True)
    builder.start({"x": (shape, torch.float32)})
    outputs = {f"{name}_{i}": f"{name}_{i}" for i in range(calls) for name in ("plain", "scaled")}
    for i in range(calls):
        renamed = {name: f"{name}_{i}" for name in ("plain", "scaled")}
        builder.call("norms", Norms, {"x": "x"}, renamed, prefix=f"{i}.")
    builder.finish("norms", "decode", outputs, num_tokens=1)
    return builder.graph()


@pytest.mark.parametrize("shape", [(1, 3, 2, 4), (1, 1, 1, 4)], ids=["rows", "a single row"])
def test_parts_are_copied_once_and_compute_torch_s_values(shape: tuple[int, ...], tmp_path: Path) -> None:
    graph = norms_graph(shape, calls=3)
    (lowered,) = lower([graph], 1)
    parameters = random_parameters(graph, FLOAT32)
    path = tmp_path / "norms.tflite"
    write_graph(lowered, parameters, path)
    written = open_graph(path)
    assert operator_counts(written, "norms")["STABLEHLO_COMPOSITE odml.rms_norm"] == 6
    assert len(written.model.subgraphs) == 2  # the signature, and the parts of all norms of one shape
    assert set(written.parts().values()) == {1}

    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    weights = {name: torch.tensor(parameter.rows(0, 4)) for name, parameter in parameters.items()}
    expected = run_signature(graph, graph.signatures[0], weights, {"x": x})
    results = Interpreter(str(path)).get_signature_runner("norms")(x=x.numpy())
    for name, result in results.items():
        np.testing.assert_allclose(result, expected[name].numpy(), rtol=1e-6)


@pytest.fixture
def composed(targets: tuple[Path, Path]) -> Graph:
    """A drafter with composites, to be damaged."""
    return open_graph(targets[1].parent / "drafter.tflite")


def first_composite(graph: Graph) -> Any:
    subgraph, index = min(graph.parts())
    return graph.model.subgraphs[subgraph].operators[index]


@pytest.mark.parametrize(("part", "named"), [(1, False), (99, True), (-1, True), (0, True)])
def test_a_damaged_composite_is_one_line(part: int, named: bool, composed: Graph) -> None:
    composite = first_composite(composed)
    composite.builtinOptions2.decompositionSubgraphIndex = part
    if not named:
        composite.builtinOptions2 = None
    with pytest.raises(BundleError, match=r"damaged, export it again$"):
        list(composed.operators())


def test_a_stranger_s_name_is_written_out(composed: Graph) -> None:
    first_composite(composed).builtinOptions2.name = b"\x1b[31m\n"
    assert any(operator.form.startswith(r"STABLEHLO_COMPOSITE \x1b[31m\n(") for operator in composed.operators())
