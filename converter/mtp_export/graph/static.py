"""TargetSpec/DrafterSpec → TracedGraph: which graphs a bundle has, and of which segments each signature is made.

A signature is a chain of calls of segments: what comes before the layers, the parts of a layer, the head. Layers of
one kind share their segments, so a graph of forty layers costs the tracing of four. No parameter enters a segment:
each is an input, and a call says which parameter of the model it stands for. The lowering chains the segments and
streams the parameters from the checkpoint to their places.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import torch

from mtp_export.arch.spec import FULL, SLIDING, DrafterSpec, LayerType, TargetSpec
from mtp_export.graph.builder import GraphBuilder, Inputs
from mtp_export.graph.ir import TracedGraph
from mtp_export.graph.walk import Place, drafter_places, target_places, walk
from mtp_export.models.attention import Attend, OwnerRows, ReaderQuery, ReadPrefix, ReadWindow
from mtp_export.models.drafter import DrafterHead, DrafterPrologue
from mtp_export.models.gpu_attention import DelegatedAttend, DelegatedOwnerRows
from mtp_export.models.target import EMBEDDERS, TargetHead, TargetPrologue
from mtp_runtime.bundle.contract import PARAM_TENSOR, CacheName, SignatureKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphShape:
    """The static sizes of a pair's graphs.

    prefix_lengths: below the whole cache, a step reads the smallest of these prefixes that holds its tokens.
    single_buffer: for a GPU, which writes caches in place and reads them as far as they are filled
    (`gpu_attention.py`): no prefixes then, and the values' caches are [1,G,D,S].
    composites: with fewer operators for a GPU (docs/decisions/0015-composites.md).
    """

    cache_length: int
    num_draft_tokens: int
    prefill_lengths: tuple[int, ...]
    prefix_lengths: tuple[int, ...]
    single_buffer: bool = False
    composites: bool = False

    @property
    def attention_lengths(self) -> tuple[int, ...]:
        """The whole cache first, then the shorter prefixes."""
        shorter = () if self.single_buffer else (n for n in self.prefix_lengths if n < self.cache_length)
        return (self.cache_length, *shorter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pass:
    """What one signature of the target computes: so many tokens, of whose cache full attention reads `length` slots."""

    kind: SignatureKind
    num_tokens: int
    length: int

    def name(self, shape: GraphShape) -> str:
        if self.kind == "prefill":
            return f"prefill_{self.num_tokens}"
        return self.kind if self.length == shape.cache_length else f"{self.kind}_{self.length}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StaticAttention:
    """Attention in three segments: rows, query, and the product with what is read of a cache.

    `reads` keeps the values that were read of each cache: once per pass.
    """

    builder: GraphBuilder
    length: int
    segment_suffix: str
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
        module, inputs = OwnerRows, {"x": x, "input_pos": "input_pos", **_rope(layer.kind)}
        if self.builder.single_buffer:
            starts = {name: name for name in ("key_start", "value_start")}
            module, inputs = DelegatedOwnerRows, {"x": x, **starts, "params": PARAM_TENSOR, **_rope(layer.kind)}
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
        if self.builder.single_buffer:
            self.reads[place.cache] = {"keys": keys, "values": values, "mask": f"mask_{kind}", "params": PARAM_TENSOR}
            return
        read = {"keys": f"{keys}_read", "values": f"{values}_read"}
        key, length = f"{kind}{self.segment_suffix}", self.length
        if kind == SLIDING:
            inputs = {"slots": "slots", "keys": keys, "values": values}
            self.builder.call(f"window_{key}", ReadWindow, inputs, read)
            read["mask"] = f"mask_{SLIDING}"
        elif self.builder.shape_of(keys)[2] == length:
            read = {"keys": keys, "values": values, "mask": "mask"}
        else:
            read["mask"] = f"mask_{FULL}"
            inputs = {"mask": "mask", "keys": keys, "values": values}
            self.builder.call(f"prefix_{key}_{length}", lambda: ReadPrefix(length), inputs, read)
        self.reads[place.cache] = read

    def shared(self, place: Place, x: str) -> str:
        spec, layer, number = place.spec, place.layer, place.number
        key, prefix = f"{layer.kind}{self.segment_suffix}", place.prefix
        query, attended = f"query_{number}", f"attended_{number}"
        inputs = {"x": x, **_rope(layer.kind)}
        self.builder.call(f"query_{key}", lambda: ReaderQuery(spec, layer), inputs, {"query": query}, prefix=prefix)
        attend = f"attend_{key}" + (f"_{self.length}" if layer.kind == FULL else "")  # a window has one length
        inputs = {"query": query, **self.reads[place.cache]}
        module = DelegatedAttend if self.builder.single_buffer else Attend
        self.builder.call(attend, lambda: module(spec, layer), inputs, {"attended": attended}, prefix=prefix)
        return attended


def _rope(kind: LayerType) -> dict[str, str]:
    return {name: f"{name}_{kind}" for name in ("cos", "sin")}


def _caches(target: TargetSpec, indices: Iterable[int], shape: GraphShape) -> Inputs:
    """Return the caches that a signature takes: keys [1,G,S,D], values too, or in a single buffer [1,G,D,S]."""
    caches = {}
    for i in indices:
        keys, values = CacheName.pair(i)
        of_keys = target.cache_shape(i, shape.cache_length)
        batch, groups, slots, size = of_keys
        caches[str(keys)] = (of_keys, torch.float32)
        of_values = (batch, groups, size, slots) if shape.single_buffer else of_keys
        caches[str(values)] = (of_values, torch.float32)
    return caches


def trace_target(spec: TargetSpec, shape: GraphShape) -> TracedGraph:
    """Return the target's graph: prefill of every length, then decode and verify, whole first, then the shorter
    variants."""
    builder = GraphBuilder("target", single_buffer=shape.single_buffer, composites=shape.composites)
    passes = [_Pass(kind="prefill", num_tokens=n, length=shape.cache_length) for n in shape.prefill_lengths]
    for length in shape.attention_lengths:
        passes.append(_Pass(kind="decode", num_tokens=1, length=length))
        passes.append(_Pass(kind="verify", num_tokens=shape.num_draft_tokens + 1, length=length))
    for one in passes:
        _target_pass(builder, spec, shape, one)
    return builder.graph()


def _target_pass(builder: GraphBuilder, spec: TargetSpec, shape: GraphShape, one: _Pass) -> None:
    num_tokens, prefill = one.num_tokens, one.kind == "prefill"
    caches = _caches(spec, range(spec.num_caches), shape)
    builder.start(
        {
            "embeddings": ((1, num_tokens, spec.hidden_size), torch.float32),
            "per_layer_embeddings": ((1, num_tokens, spec.num_layers, spec.per_layer_size), torch.float32),
            "input_pos": ((num_tokens,), torch.int32),
            "mask": ((1, 1, num_tokens, shape.cache_length), torch.float32),
            **caches,
        }
    )
    places = target_places(spec)[: spec.num_caches if prefill else spec.num_layers]
    inputs = ("embeddings", "per_layer_embeddings", "input_pos", "mask")
    prologue = functools.partial(TargetPrologue, spec, len(places), single_buffer=builder.single_buffer)
    builder.call(f"prologue_{len(places)}_{num_tokens}", prologue, {n: n for n in inputs})
    attention = _StaticAttention(builder=builder, length=one.length, segment_suffix=f"_{num_tokens}")
    outputs = {name: CacheName.parse(name).next for name in caches}
    if prefill:  # of the last layer with a cache, only what it writes there is needed
        x = walk(builder, places[:-1], "embeddings", attention)
        attention.write(places[-1], x)
    else:
        x = walk(builder, places, "embeddings", attention)
        builder.call(f"head_{num_tokens}", lambda: TargetHead(spec), {"x": x})
        outputs |= {"logits": "logits", "activations": "activations"}
    builder.finish(one.name(shape), one.kind, outputs, num_tokens=num_tokens, attention_length=one.length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Drafter:
    """A drafter over the caches of its target; the rest as `trace_drafter` takes it."""

    spec: DrafterSpec
    target: TargetSpec
    position_offset: int
    row_scales: bool


def trace_drafter(
    spec: DrafterSpec,
    target: TargetSpec,
    shape: GraphShape,
    *,
    position_offset: int,
    row_scales: bool,
) -> TracedGraph:
    """Return the drafter's graph; the full-length `draft` comes first, as LiteRT-LM runs signature 0.

    For a GPU it keeps to operations that one takes. `position_offset` is added to the positions that it is fed;
    `row_scales` dequantise the rows of the clustered table.
    """
    builder = GraphBuilder("drafter", single_buffer=shape.single_buffer, composites=shape.composites)
    drafter = _Drafter(spec=spec, target=target, position_offset=position_offset, row_scales=row_scales)
    for length in shape.attention_lengths:
        _draft_pass(builder, drafter, shape, length)
    return builder.graph()


def _draft_pass(builder: GraphBuilder, drafter: _Drafter, shape: GraphShape, length: int) -> None:
    spec, places = drafter.spec, drafter_places(drafter.spec, drafter.target)
    # One layer of each kind, sliding ones first: a cache is read once, before the layers.
    readers = [next(place for place in places if place.layer.kind == kind) for kind in (SLIDING, FULL)]
    builder.start(
        {
            "activations": ((1, 1, 2 * spec.backbone_hidden_size), torch.float32),
            "input_pos": ((1,), torch.int32),
            "mask": ((1, 1, 1, shape.cache_length), torch.float32),
            **_caches(drafter.target, [place.cache for place in readers], shape),
        }
    )
    inputs = {n: n for n in ("activations", "input_pos", "mask")}
    prologue = functools.partial(DrafterPrologue, spec, drafter.position_offset, single_buffer=builder.single_buffer)
    builder.call("prologue", prologue, inputs)
    attention = _StaticAttention(builder=builder, length=length, segment_suffix="")
    for place in readers:
        attention.read(place, [str(cache) for cache in place.caches])
    x = walk(builder, places, "x", attention)
    builder.call(
        "head",
        lambda: DrafterHead(spec, row_scales=drafter.row_scales, delegated=builder.single_buffer),
        {"x": x},
        prefix={"norm": "model."},
    )
    name = "draft" if length == shape.cache_length else f"draft_{length}"
    outputs = {n: n for n in ("logits", "projected_activations")}
    builder.finish(name, "draft", outputs, num_tokens=1, attention_length=length)


def trace_embedder(spec: TargetSpec, role: str) -> TracedGraph:
    """Return the graph of one token's embedding (`embedder`), or of its per-layer embeddings (`per_layer_embedder`)."""
    builder = GraphBuilder(role)
    builder.start({"token_ids": ((1, 1), torch.int32)})
    builder.call("embed", lambda: EMBEDDERS[role](spec), {"token_ids": "token_ids"})
    builder.finish("embed", "embed", {"embeddings": "embeddings"}, num_tokens=1, attention_length=0)
    return builder.graph()
