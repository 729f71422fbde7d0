"""TargetSpec/DrafterSpec → TracedGraph: which graphs a bundle has, and of which segments each signature is made.

A signature is a chain of calls of segments: what comes before the layers, the parts of a layer, the head. Layers of
one kind share their segments, so a graph of forty layers costs the tracing of four. No parameter enters a segment:
each is an input, and a call says which parameter of the model it stands for. The lowering chains the segments and
streams the parameters from the checkpoint to their places.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from mtp_export.arch.spec import FULL, SLIDING, DrafterSpec, LayerType, TargetSpec
from mtp_export.graph.builder import GraphBuilder, Inputs
from mtp_export.graph.ir import TracedGraph
from mtp_export.graph.walk import Place, drafter_places, target_places, walk
from mtp_export.models.attention import Attend, AttendFilled, OwnerRows, ReaderQuery, ReadFilled, ReadWindow
from mtp_export.models.drafter import DelegatedDrafterPrologue, DrafterHead, DrafterPrologue
from mtp_export.models.gpu_attention import DelegatedAttend, DelegatedOwnerRows
from mtp_export.models.ring import EndingHead, RingCheck
from mtp_export.models.target import EMBEDDERS, DelegatedPrologue, TargetHead, TargetPrologue
from mtp_runtime.bundle.contract import PARAM_TENSOR, CacheName, SignatureKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """Caches of sliding layers as rings of `length` slots; where one was taken back too far, the answer ends with
    `end_token`."""

    length: int
    end_token: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphShape:
    """The static sizes of a pair's graphs.

    cache_length: of a pair for a CPU a prime, in whose place a runtime puts the length that it wants.
    ring: None where all caches have that length.
    single_buffer: for a GPU, which writes caches in place and reads them as far as they are filled
    (`gpu_attention.py`): the values' caches are all [1,G,D,S] then.
    composites: with fewer operators for a GPU (docs/decisions/0015-composites.md).
    """

    cache_length: int
    num_draft_tokens: int
    prefill_lengths: tuple[int, ...]
    ring: Ring | None = None
    single_buffer: bool = False
    composites: bool = False

    @property
    def ring_length(self) -> int | None:
        return None if self.ring is None else self.ring.length


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pass:
    """What one signature of the target computes, over so many tokens."""

    kind: SignatureKind
    num_tokens: int

    @property
    def name(self) -> str:
        return f"prefill_{self.num_tokens}" if self.kind == "prefill" else self.kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StaticAttention:
    """Attention in three segments: rows, query, and the product with what is read of a cache.

    `reads` keeps the values that were read of each cache: once per pass.
    """

    builder: GraphBuilder
    segment_suffix: str
    places: Mapping[LayerType, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    value_suffix: str = ""
    reads: dict[int, dict[str, str]] = dataclasses.field(default_factory=dict)

    def own(self, place: Place, x: str) -> str:
        self.write(place, x)
        self.read(place, [cache.next for cache in place.caches])
        return self.shared(place, x)

    def write(self, place: Place, x: str) -> None:
        """Append the new rows of a layer's cache."""
        spec, layer = place.spec, place.layer
        keys, values = place.caches
        module: type[nn.Module] = OwnerRows
        inputs = {"x": x, **_rope(layer.kind), **self.places.get(layer.kind, {})}
        if self.builder.single_buffer:
            starts = {name: name for name in ("key_start", "value_start")}
            module, inputs = DelegatedOwnerRows, {**inputs, **starts, "params": PARAM_TENSOR}
        self.builder.call(
            f"rows_{layer.kind}{self.segment_suffix}",
            lambda: module(spec, layer),
            {**inputs, "key_cache": str(keys), "value_cache": str(values)},
            {"key_cache": keys.next, "value_cache": values.next},
            prefix=place.prefix,
        )

    def read(self, place: Place, caches: Sequence[str]) -> None:
        """Append what layers of a kind read of a cache, whose keys and values have the names `caches`: keys, values
        and mask, as an Attend takes them."""
        kind, (keys, values) = place.layer.kind, caches
        mask = {"mask": f"mask_{kind}"}
        if self.builder.single_buffer:
            self.reads[place.cache] = {"keys": keys, "values": values, **mask, "params": PARAM_TENSOR}
            return
        read = {"keys": f"{keys}_read", "values": f"{values}_read"}
        name, module = ("window", ReadWindow) if kind == SLIDING else ("filled", ReadFilled)
        inputs = {name: name, "keys": keys, "values": values}
        self.builder.call(f"{name}{self.segment_suffix}", module, inputs, read)
        self.reads[place.cache] = read | mask

    def shared(self, place: Place, x: str) -> str:
        spec, layer, number = place.spec, place.layer, place.number
        key, prefix = f"{layer.kind}{self.segment_suffix}", place.prefix
        query, attended = f"query_{number}", f"attended_{number}"
        inputs = {"x": x, **_rope(layer.kind)}
        self.builder.call(f"query_{key}", lambda: ReaderQuery(spec, layer), inputs, {"query": query}, prefix=prefix)
        inputs = {"query": query, **self.reads[place.cache]}
        module = _attend(layer.kind, single_buffer=self.builder.single_buffer)
        self.builder.call(f"attend_{key}", lambda: module(spec, layer), inputs, {"attended": attended}, prefix=prefix)
        return attended


def _attend(kind: LayerType, *, single_buffer: bool) -> type[Attend]:
    if single_buffer:
        return DelegatedAttend
    return AttendFilled if kind == FULL else Attend


def _rope(kind: LayerType) -> dict[str, str]:
    return {name: f"{name}_{kind}" for name in ("cos", "sin")}


def cache_shapes(target: TargetSpec, shape: GraphShape) -> dict[CacheName, tuple[int, ...]]:
    """Return the shapes of all caches: keys [1,G,S,D], values likewise or, of full layers and in a single buffer,
    [1,G,D,S]; with rings one more, of the positions in them, [1,1,S,1]."""
    shapes: dict[CacheName, tuple[int, ...]] = {}
    for i in range(target.num_caches):
        keys, values = CacheName.pair(i)
        full = target.layers[i].kind == FULL
        slots = shape.cache_length if full else shape.ring_length or shape.cache_length
        shapes[keys] = batch, groups, slots, size = target.cache_shape(i, slots)
        shapes[values] = (batch, groups, size, slots) if full or shape.single_buffer else shapes[keys]
    if shape.ring is not None:
        shapes[_positions(target)] = (1, 1, shape.ring.length, 1)
    return shapes


def _positions(target: TargetSpec) -> CacheName:
    """Name of the cache of positions: LiteRT-LM carries it from pass to pass by its name, as any other."""
    return CacheName(part="k", index=target.num_caches)


def _inputs(caches: Mapping[CacheName, tuple[int, ...]]) -> Inputs:
    return {str(name): (shape, torch.float32) for name, shape in caches.items()}


def trace_target(spec: TargetSpec, shape: GraphShape) -> TracedGraph:
    """Return the target's graph: prefill of every length, then decode and verify."""
    builder = GraphBuilder("target", single_buffer=shape.single_buffer, composites=shape.composites)
    passes = [_Pass(kind="prefill", num_tokens=n) for n in shape.prefill_lengths]
    passes += [_Pass(kind="decode", num_tokens=1), _Pass(kind="verify", num_tokens=shape.num_draft_tokens + 1)]
    for one in passes:
        _target_pass(builder, spec, shape, one)
    return builder.graph()


def _target_pass(builder: GraphBuilder, spec: TargetSpec, shape: GraphShape, one: _Pass) -> None:
    num_tokens, prefill = one.num_tokens, one.kind == "prefill"
    caches = cache_shapes(spec, shape)
    builder.start(
        {
            "embeddings": ((1, num_tokens, spec.hidden_size), torch.float32),
            "per_layer_embeddings": ((1, num_tokens, spec.num_layers, spec.per_layer_size), torch.float32),
            "input_pos": ((num_tokens,), torch.int32),
            "mask": ((1, 1, num_tokens, shape.cache_length), torch.float32),
            **_inputs(caches),
        }
    )
    layers = target_places(spec)[: spec.num_caches if prefill else spec.num_layers]
    inputs = ("embeddings", "per_layer_embeddings", "input_pos", "mask")
    prologue = functools.partial(TargetPrologue, ring=shape.ring_length, ends=one.kind == "verify")
    module = DelegatedPrologue if shape.single_buffer else prologue
    suffix = f"_{one.kind}_{num_tokens}"
    builder.call(f"prologue{suffix}", lambda: module(spec, len(layers)), {n: n for n in inputs})
    attention = _StaticAttention(builder=builder, segment_suffix=suffix, places=_places(builder, shape))
    outputs = {str(name): name.next for name in caches}
    lost = {}
    if shape.ring is not None:
        lost = _check_ring(builder, spec, shape.ring, attention)
    if prefill:  # of the last layer with a cache, only what it writes there is needed
        x = walk(builder, layers[:-1], "embeddings", attention)
        attention.write(layers[-1], x)
    else:
        x = walk(builder, layers, "embeddings", attention)
        builder.call(f"head{suffix}", _head(spec, shape), {"x": x, **lost})
        outputs |= {"logits": "logits", "activations": "activations"}
    builder.finish(one.name, one.kind, outputs, num_tokens=num_tokens)


def _head(spec: TargetSpec, shape: GraphShape) -> Callable[[], nn.Module]:
    ring = shape.ring
    return (lambda: TargetHead(spec)) if ring is None else (lambda: EndingHead(spec, ring.end_token))


def _places(builder: GraphBuilder, shape: GraphShape) -> dict[LayerType, dict[str, str]]:
    """Return the values that say where rows belong in the caches of each kind of layer: what the prologue gave."""
    if shape.single_buffer:
        return {}
    names = ("at", "slots", "sources")
    values = {
        kind: {name: f"{name}_{kind}" for name in names if builder.has(f"{name}_{kind}")} for kind in (FULL, SLIDING)
    }
    return {FULL: values[FULL], SLIDING: values[FULL if shape.ring is None else SLIDING]}


def _check_ring(builder: GraphBuilder, spec: TargetSpec, ring: Ring, attention: _StaticAttention) -> dict[str, str]:
    """Append the check of a ring's positions; return what the head takes of it."""
    positions, window = _positions(spec), spec.visible(spec.kinds[SLIDING])
    assert window is not None, "sliding layers have a window"
    builder.call(
        f"ring{attention.segment_suffix}",
        lambda: RingCheck(window, ring.length),
        {"input_pos": "input_pos", "positions": str(positions), **attention.places[SLIDING]},
        {"positions": positions.next},
    )
    return {"lost": "lost"}


def trace_drafter(
    spec: DrafterSpec,
    target: TargetSpec,
    shape: GraphShape,
    *,
    position_offset: int,
    row_scales: bool,
) -> TracedGraph:
    """Return the drafter's graph.

    For a GPU it keeps to operations that one takes. `position_offset` is added to the positions that it is fed;
    `row_scales` dequantise the rows of the clustered table.
    """
    builder = GraphBuilder("drafter", single_buffer=shape.single_buffer, composites=shape.composites)
    places = drafter_places(spec, target)
    # One layer of each kind, sliding ones first: a cache is read once, before the layers.
    readers = [next(place for place in places if place.layer.kind == kind) for kind in (SLIDING, FULL)]
    of_target = cache_shapes(target, shape)
    builder.start(
        {
            "activations": ((1, 1, 2 * spec.backbone_hidden_size), torch.float32),
            "input_pos": ((1,), torch.int32),
            "mask": ((1, 1, 1, shape.cache_length), torch.float32),
            **_inputs({name: of_target[name] for place in readers for name in place.caches}),
        }
    )
    prologue = functools.partial(DrafterPrologue, num_drafts=shape.num_draft_tokens, ring=shape.ring_length)
    module = DelegatedDrafterPrologue if shape.single_buffer else prologue
    inputs = {n: n for n in ("activations", "input_pos", "mask")}
    builder.call("prologue", lambda: module(spec, position_offset), inputs)
    attention = _StaticAttention(builder=builder, segment_suffix="")
    for place in readers:
        attention.read(place, [str(cache) for cache in place.caches])
    x = walk(builder, places, "x", attention)
    builder.call(
        "head",
        lambda: DrafterHead(spec, row_scales=row_scales, delegated=builder.single_buffer),
        {"x": x} if shape.single_buffer else {"x": x, "drafts": "drafts"},
        prefix={"norm": "model."},
    )
    builder.finish("draft", "draft", {n: n for n in ("logits", "projected_activations")}, num_tokens=1)
    return builder.graph()


def trace_embedder(spec: TargetSpec, role: str) -> TracedGraph:
    """Return the graph of one token's embedding (`embedder`), or of its per-layer embeddings (`per_layer_embedder`)."""
    builder = GraphBuilder(role)
    builder.start({"token_ids": ((1, 1), torch.int32)})
    builder.call("embed", lambda: EMBEDDERS[role](spec), {"token_ids": "token_ids"})
    builder.finish("embed", "embed", {"embeddings": "embeddings"}, num_tokens=1)
    return builder.graph()
