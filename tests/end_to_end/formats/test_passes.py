"""Every pass that rewrites a converted graph leaves what it computes as it was, whatever the inputs and sizes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from mtp_export.formats.tflite.chain import LoweredGraph, lower
from mtp_export.formats.tflite.gpu_table import open_graph
from mtp_export.formats.tflite.passes.caches_first import with_caches_first
from mtp_export.formats.tflite.passes.reply_ends import _ReplyEnds
from mtp_export.formats.tflite.passes.squares import with_squares_reshaped_first
from mtp_export.formats.tflite.read import read_weights
from mtp_export.formats.tflite.rewriting import rewrite
from mtp_export.formats.tflite.write import write_graph
from mtp_export.graph.builder import GraphBuilder
from mtp_export.graph.ir import TracedGraph
from mtp_export.models import cache_ops
from mtp_export.models.layers import RMSNorm, rotate
from mtp_export.weights.recipes import FLOAT32
from mtp_runtime.bundle.contract import SignatureKind
from tests.support.operators import operator_counts
from tests.support.small_graphs import random_parameters

Values = dict[str, NDArray[Any]]
Run = Callable[[Values], Values]


class Size(NamedTuple):
    """Tokens of a pass, heads, width of a head."""

    tokens: int
    heads: int
    width: int


SIZES = [Size(1, 1, 16), Size(1, 2, 8), Size(3, 1, 8), Size(5, 3, 6)]


class Norms(nn.Module):
    """A row's norm with a weight, and that of a product's heads without one, rotated."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.proj = nn.Linear(size.heads * size.width, size.heads * size.width, bias=False)
        self.whole = RMSNorm(size.heads * size.width, 1e-6)
        self.heads = RMSNorm(size.width, 1e-6, scale=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Tensor]:
        """Shapes: x [1,T,heads*D], cos and sin [1,T,1,D] -> whole [1,T,heads*D], turned [1,T,heads,D]"""
        heads = self.heads(self.proj(x).reshape(1, self.size.tokens, self.size.heads, self.size.width))
        return {"whole": self.whole(x), "turned": rotate(heads, (cos, sin))}


class Prologue(nn.Module):
    """Something of the embeddings of a prompt."""

    def forward(self, embeddings: Tensor, per_layer_embeddings: Tensor) -> dict[str, Tensor]:
        """Shapes: embeddings [1,T,H], per_layer_embeddings [1,T,L,P] -> x [1,T,H], y [1,T,L,P]"""
        return {"x": embeddings * 0.5 + 1.0, "y": torch.tanh(per_layer_embeddings)}


def norms_graph(size: Size) -> TracedGraph:
    builder = GraphBuilder("norms")
    table = ((1, size.tokens, 1, size.width), torch.float32)
    builder.start({"x": ((1, size.tokens, size.heads * size.width), torch.float32), "cos": table, "sin": table})
    builder.call("norms", lambda: Norms(size), {name: name for name in ("x", "cos", "sin")})
    names = {"whole": "whole", "turned": "turned"}
    builder.finish("verify", "verify", names, num_tokens=size.tokens)
    return builder.graph()


class Filled(nn.Module):
    """The product with the filled slots of a cache."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, filled: Tensor) -> dict[str, Tensor]:
        """Shapes: as `cache_ops.attend_filled` with all slots, filled [1] int32"""
        keys, values, mask = (cache_ops.leading(x, filled, axis) for x, axis in ((keys, 2), (values, 3), (mask, 3)))
        return {"attended": cache_ops.attend_filled(query, keys, values, mask)}


SLOTS = 192


def filled_shapes(size: Size, groups: int) -> dict[str, tuple[int, ...]]:
    return {
        "query": (1, groups, size.heads * size.tokens, size.width),
        "keys": (1, groups, SLOTS, size.width),
        "values": (1, groups, size.width, SLOTS),
        "mask": (1, 1, size.tokens, SLOTS),
    }


def filled_graph(kind: SignatureKind) -> TracedGraph:
    """A signature for each size and one or two KV heads."""
    builder = GraphBuilder(f"filled_{kind}")
    for size, groups in FILLED:
        shapes = filled_shapes(size, groups)
        builder.start({n: (shape, torch.float32) for n, shape in shapes.items()} | {"filled": ((1,), torch.int32)})
        builder.call(f"filled_{size}_{groups}", Filled, {name: name for name in (*shapes, "filled")})
        name = f"{kind}_{size.tokens}_{groups}"
        builder.finish(name, kind, {"attended": "attended"}, num_tokens=size.tokens)
    return builder.graph()


FILLED = [(Size(tokens, 2, 8), groups) for tokens in (1, 5) for groups in (1, 2)]

PROMPT = {"embeddings": (1, 4, 8), "per_layer_embeddings": (1, 4, 2, 4)}


def prompt_graph() -> TracedGraph:
    builder = GraphBuilder("prompt")
    builder.start({name: (shape, torch.float32) for name, shape in PROMPT.items()})
    builder.call("prologue", Prologue, {name: name for name in PROMPT})
    builder.finish("prefill_4", "prefill", {"x": "x", "y": "y"}, num_tokens=4)
    return builder.graph()


@pytest.fixture(scope="module")
def lowered() -> list[tuple[TracedGraph, LoweredGraph]]:
    """Every graph, converted in one go: norms of each size, a prompt, and products with caches, in a verify and in a
    prefill."""
    graphs = [*(norms_graph(size) for size in SIZES), prompt_graph(), filled_graph("verify"), filled_graph("prefill")]
    return list(zip(graphs, lower(graphs, 1), strict=True))


def runner(
    one: tuple[TracedGraph, LoweredGraph],
    path: Path,
    rewriting: Callable[[LoweredGraph], LoweredGraph] | None = None,
    name: str | None = None,
) -> Run:
    """Return what runs a graph's signature, the first without a name, in LiteRT, rewritten or not. The graph itself
    stays as it is."""
    graph, converted = one
    converted = copy.deepcopy(converted)
    write_graph(converted if rewriting is None else rewriting(converted), random_parameters(graph, FLOAT32), path)
    interpreter = Interpreter(str(path), num_threads=1)
    run = interpreter.get_signature_runner(name or graph.signatures[0].signature.name)
    return lambda inputs: run(**inputs)


def random_values(shapes: dict[str, tuple[int, ...]], seed: int) -> Values:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


PROMPTS, VERIFIES, PREFILLS = range(len(SIZES), len(SIZES) + 3)  # places among the graphs
anything = st.integers(0, 2**32 - 1)
few = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])

_SUMS = 1e-5  # of up to SLOTS products of values around one
_ROUNDING = 1e-6  # where squares are reshaped first, XNNPACK may round them once where it rounded twice


@pytest.mark.parametrize("number", range(len(SIZES)), ids=str)
def test_squares_reshaped_first(number: int, lowered: list[tuple[TracedGraph, LoweredGraph]], tmp_path: Path) -> None:
    size = SIZES[number]
    plain = runner(lowered[number], tmp_path / "plain.tflite")
    rewritten = runner(lowered[number], tmp_path / "rewritten.tflite", with_squares_reshaped_first)
    table = (1, size.tokens, 1, size.width)
    # The converter squares before it reshapes where that is one row of one head.
    same = (tmp_path / "plain.tflite").read_bytes() == (tmp_path / "rewritten.tflite").read_bytes()
    assert same == (size.tokens * size.heads > 1)

    @few
    @given(seed=anything, scale=st.floats(1e-3, 1e3))
    def check(seed: int, scale: float) -> None:
        inputs = random_values({"x": (1, size.tokens, size.heads * size.width), "cos": table, "sin": table}, seed)
        inputs["x"] *= np.float32(scale)
        expected, outputs = plain(inputs), rewritten(inputs)
        for output, value in expected.items():
            np.testing.assert_allclose(outputs[output], value, rtol=_ROUNDING, atol=_ROUNDING)

    check()


def test_the_end_of_a_reply(lowered: list[tuple[TracedGraph, LoweredGraph]], tmp_path: Path) -> None:
    """Without a first row of zeros nothing changes; with one, it is as if the token that ended were there."""
    rows = [[random_values({"row": (1, 1, *shape[2:])}, seed)["row"] for seed in range(3)] for shape in PROMPT.values()]
    plain = runner(lowered[PROMPTS], tmp_path / "plain.tflite")
    rewritten = runner(
        lowered[PROMPTS],
        tmp_path / "rewritten.tflite",
        lambda graph: rewrite(graph, functools.partial(_ReplyEnds, rows)),
    )

    @few
    @given(seed=anything, ended=st.sampled_from(["nothing", "reply", "call"]))
    def check(seed: int, ended: str) -> None:
        inputs = random_values(PROMPT, seed)
        filled = copy.deepcopy(inputs)
        for name, (reply, call, behind) in zip(PROMPT, rows, strict=True):
            if ended == "nothing":
                continue
            inputs[name][:, 0] = 0
            filled[name][:, 0] = (reply if ended == "reply" else call)[:, 0]
            if ended == "reply":
                inputs[name][:, 1] = filled[name][:, 1] = behind[:, 0]
        expected, outputs = plain(filled), rewritten(inputs)
        assert all(np.array_equal(outputs[name], expected[name]) for name in expected)

    check()


@pytest.mark.parametrize(("size", "groups"), FILLED, ids=str)
def test_caches_first(size: Size, groups: int, lowered: list[tuple[TracedGraph, LoweredGraph]], tmp_path: Path) -> None:
    """The same products, summed in another order, over any number of slots."""
    name = f"verify_{size.tokens}_{groups}"
    plain = runner(lowered[VERIFIES], tmp_path / "plain.tflite", name=name)
    rewritten = runner(lowered[VERIFIES], tmp_path / "rewritten.tflite", with_caches_first, name)

    @few
    @given(seed=anything, filled=st.integers(1, SLOTS))
    def check(seed: int, filled: int) -> None:
        inputs = random_values(filled_shapes(size, groups), seed) | {"filled": np.array([filled], np.int32)}
        expected, output = plain(inputs)["attended"], rewritten(inputs)["attended"]
        np.testing.assert_allclose(output, expected, rtol=_SUMS, atol=_SUMS)

    check()


def test_caches_come_first_where_few_tokens_are(
    lowered: list[tuple[TracedGraph, LoweredGraph]], tmp_path: Path
) -> None:
    """In each pass but a prefill, both products."""
    for number, turned in ((VERIFIES, 2), (PREFILLS, 0)):
        paths = [tmp_path / f"{name}_{number}.tflite" for name in ("plain", "rewritten")]
        for path, rewriting in zip(paths, (None, with_caches_first), strict=True):
            runner(lowered[number], path, rewriting)
        for name in open_graph(paths[0]).signature_names():
            before, after = (operator_counts(open_graph(path), name) for path in paths)
            assert (before["BATCH_MATMUL"], after["BATCH_MATMUL"]) == (2, 2)
            assert after["TRANSPOSE"] == before["TRANSPOSE"] + turned
        assert not read_weights(paths[1]), "a constant that a pass added was taken for a weight"
