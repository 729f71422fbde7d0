"""Chains of random segments, converted, compute what `run_signature` computes in torch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray
from torch import Tensor, nn

from mtp_export.formats.onnx import convert as onnx
from mtp_export.formats.onnx.write import write_onnx
from mtp_export.formats.tflite import chain as tflite
from mtp_export.formats.tflite.write import write_graph
from mtp_export.graph.builder import GraphBuilder
from mtp_export.graph.ir import TracedGraph, run_signature
from mtp_export.models.layers import RMSNorm
from mtp_export.weights.recipes import FLOAT32
from mtp_runtime.backends.onnx.opening import open_graph
from tests.support.small_graphs import random_parameters

TOKENS, WIDTH, CALLS, CHAINS = 3, 16, 7, 6
Values = dict[str, NDArray[np.float32]]

# Different sums of few terms, of values around one.
TOLERANCE = 1e-5


class Project(nn.Module):
    """A product with a matrix, small enough that values keep their size."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = RMSNorm(WIDTH, 1e-6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Shapes: x [1,T,H] -> y [1,T,H]"""
        return {"y": self.norm(self.proj(x))}


class Mix(nn.Module):
    """Two values, the second squashed and scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor, other: Tensor) -> dict[str, Tensor]:
        """Shapes: x and other [1,T,H] -> y [1,T,H]"""
        return {"y": 0.5 * x + torch.tanh(other) * self.scale}


class Split(nn.Module):
    """Halves swapped, and the value negated: two outputs."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Shapes: x [1,T,H] -> swapped and negated [1,T,H]"""
        half = WIDTH // 2
        return {"swapped": torch.cat([x[..., half:], x[..., :half]], -1), "negated": -x}


KINDS: dict[str, Callable[[], nn.Module]] = {"project": Project, "mix": Mix, "split": Split}


def random_graph(seed: int) -> TracedGraph:
    """Return a graph of two signatures, each a random chain of calls; a call's inputs are any earlier values, and its
    parameters its own or those of an earlier call."""
    chance = random.Random(seed)
    builder = GraphBuilder(f"chain{seed}")
    for tokens in (TOKENS, 1):
        shape = ((1, tokens, WIDTH), torch.float32)
        builder.start({"a": shape, "b": shape})
        values = ["a", "b"]
        for number in range(CALLS):
            kind = chance.choice(sorted(KINDS))
            inputs = {"x": chance.choice(values[-3:])}
            if kind == "mix":
                inputs["other"] = chance.choice(values)
            names = ("swapped", "negated") if kind == "split" else ("y",)
            outputs = {name: f"{name}_{number}" for name in names}
            prefix = f"{kind}.{chance.randrange(3)}."
            builder.call(f"{kind}_{tokens}", KINDS[kind], inputs, outputs, prefix=prefix)
            values += outputs.values()
        results = {"last": values[-1], "other": chance.choice(values[2:])}
        name = "decode" if tokens == 1 else "verify"
        builder.finish(name, "decode" if tokens == 1 else "verify", results, num_tokens=tokens)
    return builder.graph()


@pytest.fixture(scope="module")
def graphs() -> list[TracedGraph]:
    return [random_graph(seed) for seed in range(CHAINS)]


def expected(graph: TracedGraph, number: int) -> tuple[Values, Values]:
    """Return random inputs of a signature, and what torch makes of them."""
    traced = graph.signatures[number]
    generator = np.random.default_rng(number)
    inputs = {s.name: generator.standard_normal(s.fixed_shape, np.float32) for s in traced.signature.inputs}
    parameters = random_parameters(graph, FLOAT32)
    weights = {name: torch.from_numpy(p.rows(0, p.shape[0])) for name, p in parameters.items()}
    values = run_signature(graph, traced, weights, {name: torch.from_numpy(value) for name, value in inputs.items()})
    return inputs, {name: values[value].numpy() for name, value in traced.outputs.items()}


def assert_close(outputs: Values, results: Values) -> None:
    assert set(outputs) == set(results)
    for name, result in results.items():
        assert float(np.abs(result).max()) > 0.1
        np.testing.assert_allclose(outputs[name], result, rtol=TOLERANCE, atol=TOLERANCE)


def test_litert_computes_what_torch_does(graphs: list[TracedGraph], tmp_path: Path) -> None:
    for graph, lowered in zip(graphs, tflite.lower(graphs, 1), strict=True):
        path = tmp_path / f"{graph.role}.tflite"
        write_graph(lowered, random_parameters(graph, FLOAT32), path)
        interpreter = Interpreter(str(path), num_threads=1)
        for number, traced in enumerate(graph.signatures):
            inputs, results = expected(graph, number)
            assert_close(interpreter.get_signature_runner(traced.signature.name)(**inputs), results)


def test_onnx_runtime_computes_what_torch_does(graphs: list[TracedGraph], tmp_path: Path) -> None:
    """A graph of ONNX has one signature: the first."""
    ones = [dataclasses.replace(g, signatures=g.signatures[:1]) for g in graphs]
    for graph, lowered in zip(ones, onnx.lower(ones, 1, portable=True), strict=True):
        path = tmp_path / f"{graph.role}.onnx"
        write_onnx(lowered, random_parameters(graph, FLOAT32), path)
        session = open_graph(path, 1)
        inputs, results = expected(graph, 0)
        used = {value.name for value in session.get_inputs()}
        outputs = session.run(list(results), {name: value for name, value in inputs.items() if name in used})
        assert_close(dict(zip(results, outputs, strict=True)), results)
