"""Operations on caches, converted, compute what they compute in torch: at any position, and whatever length a runtime
puts in the place of the one that they were converted with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray
from torch import Tensor, nn

from mtp_export.arch.spec import DecoderSpec
from mtp_export.formats.tflite.chain import LoweredGraph, lower
from mtp_export.formats.tflite.passes.caches_first import with_caches_first
from mtp_export.formats.tflite.write import write_graph
from mtp_export.graph.builder import GraphBuilder
from mtp_export.graph.ir import TracedGraph, run_signature
from mtp_export.models import cache_ops
from mtp_export.models.attention import ReadFilled, ReadWindow
from mtp_export.models.positions import Window, WritePlaces, filled_slots, written
from mtp_export.models.ring import RingCheck
from tests.support.tiny import Tiny

Values = dict[str, NDArray[Any]]

PRIME, RING, WINDOW, HEADS, WIDTH = 2053, 256, 100, 2, 8
# As LiteRT-LM puts in the place of the prime; the last two are no multiple of what kernels like.
LENGTHS = (PRIME, 512, 301)


class Pass(NamedTuple):
    """A pass of some tokens over caches of some KV heads. `ends`: it may go past an end, as a verify."""

    tokens: int
    groups: int
    ends: bool

    @property
    def name(self) -> str:
        return f"{'verify' if self.ends else 'prefill'}_{self.tokens}_{self.groups}"


PASSES = [
    *(Pass(tokens, groups, True) for tokens, groups in ((1, 1), (1, 2), (4, 2), (5, 1), (5, 2))),
    *(Pass(tokens, groups, False) for tokens, groups in ((16, 2), (128, 1))),
]


class Prologue(nn.Module):
    """What depends on positions alone."""

    def __init__(self, spec: DecoderSpec, *, ends: bool) -> None:
        super().__init__()
        self.window, self.places = Window(spec, aligned=True, ring=RING), WritePlaces(RING, ends=ends)

    def forward(self, input_pos: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Shapes: as `positions` has them"""
        count = cache_ops.slot_count(mask)
        parts = (self.window(input_pos, mask, count), filled_slots(input_pos, mask, count))
        return {"count": count, **parts[0], **parts[1], **self.places(input_pos, count)}


class Write(nn.Module):
    """Rows into caches of which the second has slots along `axis`."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, rows: Tensor, keys: Tensor, values: Tensor, **where: Tensor) -> dict[str, Tensor]:
        """Shapes: rows [1,G,T,D], keys [1,G,S,D], values likewise or [1,G,D,S] -> the same caches"""
        turned = rows.transpose(2, 3) if self.axis == 3 else rows
        return {"keys": written(keys, rows, where, 2), "values": written(values, turned, where, self.axis)}


class Attend(nn.Module):
    """The product itself."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Shapes: as `cache_ops.attend_filled`"""
        return {"attended": cache_ops.attend_filled(query, keys, values, mask)}


def caches_graph() -> TracedGraph:
    builder = GraphBuilder("caches")
    for one in PASSES:
        add_signature(builder, one)
    return builder.graph()


def add_signature(builder: GraphBuilder, one: Pass) -> None:
    tokens, groups = one.tokens, one.groups
    kind = f"{tokens}_{one.ends}"
    shapes = {
        "mask": (1, 1, tokens, PRIME),
        "query": (1, groups, HEADS * tokens, WIDTH),
        "rows": (1, groups, tokens, WIDTH),
        "keys": (1, groups, PRIME, WIDTH),
        "values": (1, groups, WIDTH, PRIME),
        "ring_keys": (1, groups, RING, WIDTH),
        "ring_values": (1, groups, RING, WIDTH),
        "positions": (1, 1, RING, 1),
    }
    builder.start(
        {"input_pos": ((tokens,), torch.int32), **{name: (shape, torch.float32) for name, shape in shapes.items()}}
    )
    spec = Tiny(sliding_window=WINDOW).target_spec
    inputs = {name: name for name in ("input_pos", "mask")}
    builder.call(f"prologue_{kind}", lambda: Prologue(spec, ends=one.ends), inputs)
    names = ("at", "slots", "sources")
    full, ring = (
        {name: f"{name}_{of}" for name in names if builder.has(f"{name}_{of}")}
        for of in ("full_attention", "sliding_attention")
    )
    caches = {"rows": "rows", "keys": "keys", "values": "values", **full}
    renamed = {name: f"{name}_next" for name in ("keys", "values")}
    builder.call(f"write_{kind}_{groups}", lambda: Write(3), caches, renamed)
    rings = {"rows": "rows", "keys": "ring_keys", "values": "ring_values", **ring}
    renamed_rings = {name: f"ring_{name}_next" for name in ("keys", "values")}
    builder.call(f"ring_{kind}_{groups}", lambda: Write(2), rings, renamed_rings)
    checked = {"input_pos": "input_pos", "positions": "positions", **ring}
    builder.call(f"check_{kind}", lambda: RingCheck(WINDOW, RING), checked, {"positions": "positions_next"})
    read = {name: f"{name}_read" for name in ("keys", "values")}
    builder.call(f"filled_{groups}", ReadFilled, {"filled": "filled", **renamed}, read)
    near = {name: f"near_{name}" for name in ("keys", "values")}
    builder.call(f"window_{kind}_{groups}", ReadWindow, {"window": "window", **renamed_rings}, near)
    attended = {"query": "query", "mask": "mask_full_attention", **read}
    builder.call(f"attend_{kind}_{groups}", Attend, attended)
    outputs = ["count", "filled", "attended", "lost", "mask_sliding_attention", "positions_next", *near.values()]
    outputs += [*renamed.values(), *renamed_rings.values()]
    builder.finish(one.name, "verify" if one.ends else "prefill", {n: n for n in outputs}, num_tokens=tokens)


@pytest.fixture(scope="module")
def converted() -> tuple[TracedGraph, LoweredGraph]:
    graph = caches_graph()
    (lowered,) = lower([graph], 1)
    return graph, lowered


@pytest.fixture(scope="module")
def opened(
    converted: tuple[TracedGraph, LoweredGraph], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], Any]:
    """Return a function that returns what runs a signature at a length."""
    interpreters: dict[int, Interpreter] = {}

    def open_at(length: int, name: str) -> Any:
        if length not in interpreters:
            path = tmp_path_factory.mktemp("caches") / f"{length}.tflite"
            write_graph(with_caches_first(at_length(converted[1], length)), {}, path)
            interpreters[length] = Interpreter(str(path), num_threads=1)
        return interpreters[length].get_signature_runner(name)

    return open_at


def at_length(lowered: LoweredGraph, length: int) -> LoweredGraph:
    """Return a copy with another length in the shapes, as LiteRT-LM makes it: in the place of the prime's multiples."""
    changed = copy.deepcopy(lowered)
    for subgraph in changed.model.subgraphs:
        for tensor in subgraph.tensors:
            for shape in (tensor.shape, tensor.shapeSignature):
                for axis, size in enumerate(() if shape is None else shape):
                    if size > 0 and size % PRIME == 0:
                        shape[axis] = size // PRIME * length
    return changed


def inputs_of(one: Pass, length: int, first: int, last: int | None = None) -> Values:
    """Random values of a pass at `first`, whose last token has another position where one is to fill it up."""
    generator = np.random.default_rng(first)
    shapes = {
        "query": (1, one.groups, HEADS * one.tokens, WIDTH),
        "rows": (1, one.groups, one.tokens, WIDTH),
        "keys": (1, one.groups, length, WIDTH),
        "values": (1, one.groups, WIDTH, length),
        "ring_keys": (1, one.groups, RING, WIDTH),
        "ring_values": (1, one.groups, RING, WIDTH),
    }
    values: Values = {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    positions = np.arange(first, first + one.tokens, dtype=np.int32)
    mask = np.where(np.arange(length)[None] <= positions[:, None], 0, -1e9)
    slots = np.arange(RING)
    written_last = first - 1 - (first - 1 - slots) % RING  # the last position before this pass in each slot
    if last is not None:
        positions[-1] = last
    values |= {"input_pos": positions, "mask": mask.astype(np.float32)[None, None]}
    values["positions"] = np.where(slots < first, written_last, 0).astype(np.float32).reshape(1, 1, RING, 1)
    return values


def edges(one: Pass, length: int) -> Iterable[int]:
    """Positions of a pass around every edge: of a step of full layers, of the ring, and of the cache."""
    last = length - 1 if one.ends else length - one.tokens
    around = [edge + by for edge in (0, WINDOW, 256, 512, length) for by in (-1, 0, 1)]
    starts = {edge - tokens for edge in around for tokens in (0, 1, one.tokens - 1, one.tokens)}
    return sorted(first for first in starts | {last} if 0 <= first <= last)


def assert_same(graph: TracedGraph, one: Pass, inputs: Values, outputs: Values) -> None:
    """Compare with torch: sums to their rounding, all else exactly."""
    traced = next(t for t in graph.signatures if t.signature.name == one.name)
    values = run_signature(graph, traced, {}, {name: torch.from_numpy(value) for name, value in inputs.items()})
    first = int(inputs["input_pos"][0])
    for name, output in outputs.items():
        expected = values[name].numpy()
        if name in ("attended", "mask_sliding_attention"):
            np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5, err_msg=f"{name} at {first}")
        else:
            np.testing.assert_array_equal(output, expected, err_msg=f"{name} at {first}")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("one", PASSES, ids=lambda one: one.name)
def test_at_every_edge(
    one: Pass, length: int, converted: tuple[TracedGraph, LoweredGraph], opened: Callable[[int, str], Any]
) -> None:
    run = opened(length, one.name)
    for first in edges(one, length):
        inputs = inputs_of(one, length, first)
        outputs = run(**inputs)
        assert_same(converted[0], one, inputs, outputs)
        assert (int(outputs["count"][0]), float(outputs["lost"][0])) == (length, 0.0)


@pytest.mark.parametrize("length", [301])
def test_at_every_position(
    length: int, converted: tuple[TracedGraph, LoweredGraph], opened: Callable[[int, str], Any]
) -> None:
    one = Pass(5, 1, True)
    run = opened(length, one.name)
    for first in range(length):
        inputs = inputs_of(one, length, first)
        assert_same(converted[0], one, inputs, run(**inputs))


def test_a_ring_that_was_taken_back_too_far_is_noticed(
    converted: tuple[TracedGraph, LoweredGraph], opened: Callable[[int, str], Any]
) -> None:
    """In every pass, where one position of the window is another's; not where one before the window is."""
    for one in PASSES:
        run = opened(PRIME, one.name)
        for distance, lost in ((1, 1.0), (WINDOW - 1, 1.0), (WINDOW, 0.0)):
            inputs = inputs_of(one, PRIME, 700)
            inputs["positions"][0, 0, (700 - distance) % RING] += RING
            outputs = run(**inputs)
            assert_same(converted[0], one, inputs, outputs)
            assert float(outputs["lost"][0]) == lost, (one, distance)


@pytest.mark.parametrize("one", [one for one in PASSES if not one.ends], ids=lambda one: one.name)
def test_a_token_has_the_same_bits_however_much_is_read(one: Pass, opened: Callable[[int, str], Any]) -> None:
    """Positions of tokens that fill a prefill up may be anything: 300 makes full layers read 512 slots, not 256."""
    run = opened(PRIME, one.name)
    plain, more = (run(**inputs_of(one, PRIME, 100, last)) for last in (None, 300))
    assert (int(plain["filled"][0]), int(more["filled"][0])) == (256, 512)
    assert np.array_equal(plain["attended"], more["attended"])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("first", [3, 254, 509, 1021])
def test_a_token_has_the_same_bits_in_every_pass(groups: int, first: int, opened: Callable[[int, str], Any]) -> None:
    """Else drafts could change what is said at a tie."""
    several = Pass(5, groups, True)
    inputs = inputs_of(several, PRIME, first)
    outputs = opened(PRIME, several.name)(**inputs)
    alone = inputs_of(Pass(1, groups, True), PRIME, first)
    by_head = dict.fromkeys(("query", "attended"), (1, groups, HEADS, several.tokens, WIDTH))
    queries = inputs["query"].reshape(by_head["query"])
    attended = outputs["attended"].reshape(by_head["attended"])
    caches = {"keys": inputs["keys"], "values": inputs["values"]}
    for number in range(several.tokens):
        alone |= caches | {
            "input_pos": inputs["input_pos"][number : number + 1],
            "mask": inputs["mask"][:, :, number : number + 1],
            "query": np.ascontiguousarray(queries[:, :, :, number]),
            "rows": inputs["rows"][:, :, number : number + 1],
        }
        one_by_one = opened(PRIME, Pass(1, groups, True).name)(**alone)
        caches = {name: one_by_one[f"{name}_next"] for name in caches}
        assert np.array_equal(one_by_one["attended"], attended[:, :, :, number]), number
