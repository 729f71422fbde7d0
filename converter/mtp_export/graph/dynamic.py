"""TargetSpec/DrafterSpec → TracedGraph for formats whose attention writes its own rows: one signature a graph, for any
number of sequences, tokens and cache slots.

Every graph is evaluated at two sets of sizes; a dimension that follows one of them is dynamic and named after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec
import torch

from mtp_export.arch.spec import FULL, SLIDING, DecoderSpec, DrafterSpec, LayerType, TargetSpec
from mtp_export.graph.builder import GraphBuilder
from mtp_export.graph.ir import TracedGraph
from mtp_export.models import dynamic as in_place
from mtp_export.models.layers import FeedForward
from mtp_export.models.target import EMBEDDERS, TargetFeedForward, TargetHead
from mtp_runtime.bundle.contract import GraphSignature, TensorSpec

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
    """Axis → name of each dimension that differs between the two evaluations."""
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


def _caches(target: TargetSpec, indices: list[int], sizes: _Sizes) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    slots = {FULL: sizes.full_slots, SLIDING: sizes.sliding_slots}
    return {
        f"kv_cache_{part}_{i}": (
            (sizes.batch, *target.cache_shape(i, slots[target.layer_types[i]])[1:]),
            torch.float32,
        )
        for i in indices
        for part in "kv"
    }


def _fills(sizes: _Sizes) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """How full the pools are: slot of the last row of each sequence, and the largest number of rows."""
    return {
        f"{pool}_{what}": (shape, torch.int32)
        for pool in _POOLS.values()
        for what, shape in (("last", (sizes.batch,)), ("total", ()))
    }


def _attention_inputs(
    layer_type: LayerType, x: str, key_cache: str, value_cache: str, suffix: str = ""
) -> dict[str, str]:
    """`suffix` ends the names of the rotary tables."""
    pool = _POOLS[layer_type]
    return {
        "x": x,
        "cos": f"cos_{layer_type}{suffix}",
        "sin": f"sin_{layer_type}{suffix}",
        "key_cache": key_cache,
        "value_cache": value_cache,
        "last": f"{pool}_last",
        "total": f"{pool}_total",
    }


def _target(spec: TargetSpec, sizes: _Sizes) -> TracedGraph:
    builder = GraphBuilder("target")
    batch, tokens = sizes.batch, sizes.tokens
    caches = _caches(spec, list(range(spec.num_caches)), sizes)
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
    given = ("embeddings", "per_layer_embeddings", "positions")
    builder.call("prologue", lambda: in_place.Prologue(spec), {n: n for n in given})
    x, suffix = "embeddings", ""
    read: dict[str, str] = {}
    for i in range(spec.num_layers):
        if i == spec.num_caches:
            x, suffix = _take_rows(builder, spec, x), _ROWS
        kind, cache, width, prefix = (
            spec.layer_types[i],
            spec.cache_index(i),
            spec.intermediate_sizes[i],
            f"layers.{i}.",
        )
        if i == cache:
            names = {"key_cache": f"kv_cache_k_{i}", "value_cache": f"kv_cache_v_{i}"}
            outputs = {"attended": f"attended_{i}", **{n: f"{v}_next" for n, v in names.items()}}
            inputs = _attention_inputs(kind, x, *names.values())
            builder.call(f"owner_{kind}", _build(in_place.OwnerAttention, spec, kind), inputs, outputs, prefix=prefix)
        else:
            # What the owner wrote in this pass, not what it was given: this orders the operations.
            written = (f"kv_cache_k_{cache}_next", f"kv_cache_v_{cache}_next")
            read |= _reader(builder, spec, i, x, cache, written, suffix=suffix)
        inputs = {"x": x, "attended": f"attended_{i}", "per_layer_input": f"per_layer_input_{i}{suffix}"}
        key = f"feed_forward_{width}{suffix}"
        builder.call(key, _build(TargetFeedForward, spec, width), inputs, {"x": f"x_{i}"}, prefix=prefix)
        x = f"x_{i}"
    if not suffix:  # every layer has a cache
        x = _take_rows(builder, spec, x)
    builder.call("head", lambda: TargetHead(spec), {"x": x})
    outputs = {name: f"{name}_next" for name in caches} | read | {"logits": "logits", "activations": "activations"}
    builder.finish("forward", "forward", outputs, num_tokens=0, attention_length=0)
    return builder.graph()


def _take_rows(builder: GraphBuilder, spec: TargetSpec, x: str) -> str:
    """Append that all layers from here on compute, only for the tokens whose logits are wanted: most of a prefill's are
    in caches now, and that is all that they are for. Returns the name that `x` has then."""
    values = [x, *(f"{table}_{kind}" for kind in _POOLS for table in ("cos", "sin"))]
    values += [f"per_layer_input_{i}" for i in range(spec.num_caches, spec.num_layers)]
    inputs = {"rows": "logit_rows", **{value: value for value in values}}
    builder.call("rows", in_place.TakeRows, inputs, {value: f"{value}{_ROWS}" for value in values})
    return f"{x}{_ROWS}"


def _build(module: Callable[..., torch.nn.Module], *arguments: object) -> Callable[[], torch.nn.Module]:
    return lambda: module(*arguments)


def _reader(
    builder: GraphBuilder,
    spec: DecoderSpec,
    i: int,
    x: str,
    cache: int,
    caches: tuple[str, str],
    *,
    path: str = "",
    suffix: str = "",
) -> dict[str, str]:
    """Append the attention of layer i, which reads `caches`, those of layer `cache`; returns the outputs that its
    caches go out by, `kv_cache_k_4.9` for the keys of layer 4 as layer 9 leaves them."""
    kind = spec.layer_types[i]
    builder.call(
        f"reader_{kind}",
        _build(in_place.ReaderAttention, spec, kind),
        _attention_inputs(kind, x, *caches, suffix),
        {"attended": f"attended_{i}", "key_cache": f"k_read_{i}", "value_cache": f"v_read_{i}"},
        prefix=f"{path}layers.{i}.",
    )
    return {f"kv_cache_{part}_{cache}.{i}": f"{part}_read_{i}" for part in "kv"}


def _drafter(
    spec: DrafterSpec, target: TargetSpec, sizes: _Sizes, position_offset: int, quantised_head: bool
) -> TracedGraph:
    builder = GraphBuilder("drafter")
    owners: dict[LayerType, int] = {kind: target.shared_cache_index(kind) for kind in (SLIDING, FULL)}
    builder.start(
        {
            "activations": ((sizes.batch, 1, 2 * spec.backbone_hidden_size), torch.float32),
            "positions": ((sizes.batch, 1), torch.int32),
            **_fills(sizes),
            **_caches(target, sorted(owners.values()), sizes),
        }
    )
    inputs = {"activations": "activations", "positions": "positions"}
    builder.call("prologue", lambda: in_place.DrafterPrologue(spec, position_offset), inputs)
    x = "x"
    read: dict[str, str] = {}
    for i, (kind, width) in enumerate(zip(spec.layer_types, spec.intermediate_sizes, strict=True)):
        owner = owners[kind]
        read |= _reader(builder, spec, i, x, owner, (f"kv_cache_k_{owner}", f"kv_cache_v_{owner}"), path="model.")
        builder.call(
            f"feed_forward_{width}",
            _build(FeedForward, spec, width),
            {"x": x, "attended": f"attended_{i}"},
            {"x": f"x_{i}"},
            prefix=f"model.layers.{i}.",
        )
        x = f"x_{i}"
    builder.call(
        "head", lambda: in_place.CandidateHead(spec, quantised=quantised_head), {"x": x}, prefix={"norm": "model."}
    )
    outputs = read | {n: n for n in ("candidates", "scores", "best", "projected_activations")}
    builder.finish("draft", "draft", outputs, num_tokens=1, attention_length=0)
    return builder.graph()


def _embedder(spec: TargetSpec, role: str, sizes: _Sizes) -> TracedGraph:
    builder = GraphBuilder(role)
    builder.start({"token_ids": ((sizes.batch, sizes.tokens), torch.int32)})
    builder.call("embed", _build(EMBEDDERS[role], spec), {"token_ids": "token_ids"})
    builder.finish("embed", "embed", {"embeddings": "embeddings"}, num_tokens=0, attention_length=0)
    return builder.graph()
