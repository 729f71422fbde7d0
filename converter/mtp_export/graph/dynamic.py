"""TargetSpec/DrafterSpec → TracedGraph for formats whose attention writes its own rows: one signature a graph, for any
number of sequences, tokens and cache slots.

Every graph is evaluated at two sets of sizes; a dimension that follows one of them is dynamic and named after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import msgspec
import torch

from mtp_export.arch.spec import FULL, SLIDING, DrafterSpec, LayerType, TargetSpec
from mtp_export.graph.builder import GraphBuilder, Inputs
from mtp_export.graph.ir import TracedGraph
from mtp_export.graph.walk import Place, drafter_places, target_places, walk
from mtp_export.models import dynamic as in_place
from mtp_export.models.target import EMBEDDERS, TargetHead
from mtp_runtime.bundle.contract import CacheName, GraphSignature, TensorSpec

_POOLS: dict[LayerType, str] = {FULL: "full", SLIDING: "sliding"}
_ROWS = "_of_rows"  # ends the names of values that are there only for the tokens whose logits are wanted


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """One value for each dynamic dimension, different from every other and from any size of a model."""

    batch: int
    tokens: int
    rows: int
    full_slots: int
    sliding_slots: int


_SIZES = (_Sizes(11, 13, 7, 1009, 1013), _Sizes(17, 19, 5, 1019, 1021))


def trace_target(spec: TargetSpec) -> TracedGraph:
    """Return the target's graph."""
    return _at_two_sizes(lambda sizes: _target(spec, sizes))


def trace_embedder(spec: TargetSpec, role: str) -> TracedGraph:
    """Return the graph of tokens' embeddings (`embedder`), or of their per-layer embeddings (`per_layer_embedder`)."""
    return _at_two_sizes(lambda sizes: _embedder(spec, role, sizes))


def trace_drafter(spec: DrafterSpec, target: TargetSpec, *, position_offset: int, quantised_head: bool) -> TracedGraph:
    """Return the drafter's graph."""
    return _at_two_sizes(lambda sizes: _drafter(spec, target, sizes, position_offset, quantised_head))


def _at_two_sizes(trace: Callable[[_Sizes], TracedGraph]) -> TracedGraph:
    first, second = (trace(sizes) for sizes in _SIZES)
    segments = {}
    for key, segment in first.segments.items():
        changed = second.segments[key].inputs
        dynamic = {name: frozenset(_names(t.shape, changed[name].shape)) for name, t in segment.inputs.items()}
        segments[key] = dataclasses.replace(segment, dynamic=dynamic)
    (traced,), (other,) = first.signatures, second.signatures
    traced = dataclasses.replace(traced, signature=_named(traced.signature, other.signature))
    return dataclasses.replace(first, segments=segments, signatures=(traced,))


def _names(shape: tuple[int, ...], other: tuple[int, ...]) -> dict[int, str]:
    """Return axis → name of each dimension that differs between the two evaluations."""
    first, second = (dataclasses.asdict(sizes) for sizes in _SIZES)
    pairs = {(first[name], second[name]): name for name in first}
    sizes = enumerate(zip(shape, other, strict=True))
    return {axis: pairs[pair] for axis, pair in sizes if pair[0] != pair[1]}


def _named(signature: GraphSignature, other: GraphSignature) -> GraphSignature:
    def name(spec: TensorSpec, changed: TensorSpec) -> TensorSpec:
        names = _names(spec.fixed_shape, changed.fixed_shape)
        shape = tuple(names.get(axis, size) for axis, size in enumerate(spec.shape))
        return TensorSpec(name=spec.name, shape=shape, dtype=spec.dtype)

    return msgspec.structs.replace(
        signature,
        inputs=tuple(map(name, signature.inputs, other.inputs)),
        outputs=tuple(map(name, signature.outputs, other.outputs)),
    )


def _caches(target: TargetSpec, indices: Iterable[int], sizes: _Sizes) -> Inputs:
    """Return the caches that a graph takes."""
    slots = {FULL: sizes.full_slots, SLIDING: sizes.sliding_slots}
    return {
        str(name): ((sizes.batch, *target.cache_shape(i, slots[target.layers[i].kind])[1:]), torch.float32)
        for i in indices
        for name in CacheName.pair(i)
    }


def _fills(sizes: _Sizes) -> Inputs:
    """Return how full the pools are: slot of the last row of each sequence, and the largest number of rows."""
    return {
        f"{pool}_{name}": (shape, torch.int32)
        for pool in _POOLS.values()
        for name, shape in (("last", (sizes.batch,)), ("total", ()))
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DynamicAttention:
    """Attention in one segment, which writes rows where the layer owns a cache.

    `writes`: the pass writes caches, and readers read what their owner wrote in it: this orders the operations.
    `outputs`: the outputs by which readers give caches back, kept as they are appended.
    """

    builder: GraphBuilder
    writes: bool
    value_suffix: str
    outputs: dict[str, str]

    @property
    def segment_suffix(self) -> str:
        return self.value_suffix

    def own(self, place: Place, x: str) -> str:
        spec, layer, attended = place.spec, place.layer, f"attended_{place.number}"
        keys, values = place.caches
        self.builder.call(
            f"owner_{layer.kind}",
            lambda: in_place.OwnerAttention(spec, layer),
            self._inputs(layer.kind, x, [str(keys), str(values)]),
            {"attended": attended, "key_cache": keys.next, "value_cache": values.next},
            prefix=place.prefix,
        )
        return attended

    def shared(self, place: Place, x: str) -> str:
        spec, layer, number = place.spec, place.layer, place.number
        attended, read = f"attended_{number}", (f"k_read_{number}", f"v_read_{number}")
        self.builder.call(
            f"reader_{layer.kind}",
            lambda: in_place.ReaderAttention(spec, layer),
            self._inputs(layer.kind, x, [cache.next if self.writes else str(cache) for cache in place.caches]),
            {"attended": attended, "key_cache": read[0], "value_cache": read[1]},
            prefix=place.prefix,
        )
        names = (str(dataclasses.replace(cache, reader=number)) for cache in place.caches)
        self.outputs.update(zip(names, read, strict=True))
        return attended

    def _inputs(self, kind: LayerType, x: str, caches: Sequence[str]) -> dict[str, str]:
        pool, suffix = _POOLS[kind], self.value_suffix
        return {
            "x": x,
            "cos": f"cos_{kind}{suffix}",
            "sin": f"sin_{kind}{suffix}",
            "key_cache": caches[0],
            "value_cache": caches[1],
            "last": f"{pool}_last",
            "total": f"{pool}_total",
        }


def _target(spec: TargetSpec, sizes: _Sizes) -> TracedGraph:
    builder = GraphBuilder("target")
    batch, tokens = sizes.batch, sizes.tokens
    caches = _caches(spec, range(spec.num_caches), sizes)
    builder.start(
        {
            "embeddings": ((batch, tokens, spec.hidden_size), torch.float32),
            "per_layer_embeddings": ((batch, tokens, spec.num_layers, spec.per_layer_size), torch.float32),
            "positions": ((batch, tokens), torch.int32),
            "logit_rows": ((sizes.rows,), torch.int32),
            **_fills(sizes),
            **caches,
        }
    )
    inputs = ("embeddings", "per_layer_embeddings", "positions")
    builder.call("prologue", lambda: in_place.Prologue(spec), {n: n for n in inputs})
    places, read = target_places(spec), dict[str, str]()
    whole = _DynamicAttention(builder=builder, writes=True, value_suffix="", outputs=read)
    x = walk(builder, places[: spec.num_caches], "embeddings", whole)
    x = _take_rows(builder, spec, x)
    x = walk(builder, places[spec.num_caches :], x, dataclasses.replace(whole, value_suffix=_ROWS))
    builder.call("head", lambda: TargetHead(spec), {"x": x})
    written = {name: CacheName.parse(name).next for name in caches}
    outputs = written | read | {"logits": "logits", "activations": "activations"}
    builder.finish("forward", "forward", outputs, num_tokens=0)
    return builder.graph()


def _take_rows(builder: GraphBuilder, spec: TargetSpec, x: str) -> str:
    """Append that all layers from here on compute only for the tokens whose logits are wanted: most of a prefill's are
    in caches now, and that is all that they are for. Return the name that `x` has then."""
    values = [x, *(f"{table}_{kind}" for kind in _POOLS for table in ("cos", "sin"))]
    values += [f"per_layer_input_{i}" for i in range(spec.num_caches, spec.num_layers)]
    inputs = {"rows": "logit_rows", **{value: value for value in values}}
    builder.call("rows", in_place.TakeRows, inputs, {value: f"{value}{_ROWS}" for value in values})
    return f"{x}{_ROWS}"


def _drafter(
    spec: DrafterSpec, target: TargetSpec, sizes: _Sizes, position_offset: int, quantised_head: bool
) -> TracedGraph:
    builder = GraphBuilder("drafter")
    places, read = drafter_places(spec, target), dict[str, str]()
    builder.start(
        {
            "activations": ((sizes.batch, 1, 2 * spec.backbone_hidden_size), torch.float32),
            "positions": ((sizes.batch, 1), torch.int32),
            **_fills(sizes),
            **_caches(target, sorted({place.cache for place in places}), sizes),
        }
    )
    inputs = {"activations": "activations", "positions": "positions"}
    builder.call("prologue", lambda: in_place.DrafterPrologue(spec, position_offset), inputs)
    attention = _DynamicAttention(builder=builder, writes=False, value_suffix="", outputs=read)
    x = walk(builder, places, "x", attention)
    builder.call(
        "head", lambda: in_place.CandidateHead(spec, quantised=quantised_head), {"x": x}, prefix={"norm": "model."}
    )
    outputs = read | {n: n for n in ("candidates", "scores", "best", "projected_activations")}
    builder.finish("draft", "draft", outputs, num_tokens=1)
    return builder.graph()


def _embedder(spec: TargetSpec, role: str, sizes: _Sizes) -> TracedGraph:
    builder = GraphBuilder(role)
    builder.start({"token_ids": ((sizes.batch, sizes.tokens), torch.int32)})
    builder.call("embed", lambda: EMBEDDERS[role](spec), {"token_ids": "token_ids"})
    builder.finish("embed", "embed", {"embeddings": "embeddings"}, num_tokens=0)
    return builder.graph()
