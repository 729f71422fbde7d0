"""TargetSpec/DrafterSpec → TracedGraph: which graphs a bundle has, and of which segments each signature is made.

A signature is a chain of calls of segments: what comes before the layers, the parts of a layer, the head. Layers of
one kind share their segments, so a graph of forty layers costs the tracing of four. No parameter enters a segment:
each is an input, and a call says which parameter of the model it stands for. The lowering chains the segments and
streams the parameters from the checkpoint to their places.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import torch

from mtp_export.arch.spec import FULL, SLIDING, DecoderSpec, DrafterSpec, LayerType, TargetSpec
from mtp_export.graph.builder import GraphBuilder
from mtp_export.graph.ir import TracedGraph
from mtp_export.models.attention import Attend, OwnerRows, ReaderQuery, ReadPrefix, ReadWindow
from mtp_export.models.drafter import DrafterHead, DrafterPrologue
from mtp_export.models.gpu_attention import DelegatedAttend, DelegatedOwnerRows
from mtp_export.models.layers import FeedForward
from mtp_export.models.target import EMBEDDERS, TargetFeedForward, TargetHead, TargetPrologue
from mtp_runtime.bundle.contract import PARAM_TENSOR, SignatureKind


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


def _rope(layer_type: LayerType) -> dict[str, str]:
    return {name: f"{name}_{layer_type}" for name in ("cos", "sin")}


def _cache_shapes(
    builder: GraphBuilder, spec: TargetSpec, owners: Iterable[int], length: int
) -> dict[str, tuple[int, ...]]:
    """The caches of some layers of the target, and their shapes: keys [1,G,S,D], values too, or [1,G,D,S]."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in owners:
        batch, groups, slots, size = shapes[f"kv_cache_k_{i}"] = spec.cache_shape(i, length)
        value = (batch, groups, size, slots) if builder.single_buffer else (batch, groups, slots, size)
        shapes[f"kv_cache_v_{i}"] = value
    return shapes


def _read(
    builder: GraphBuilder, layer_type: LayerType, keys: str, values: str, key: str, length: int
) -> dict[str, str]:
    """Append what a layer type reads of a cache; returns the values that an Attend takes: keys, values and mask."""
    if builder.single_buffer:
        return {"keys": keys, "values": values, "mask": f"mask_{layer_type}", "params": PARAM_TENSOR}
    read = {"keys": f"{keys}_read", "values": f"{values}_read"}
    if layer_type == SLIDING:
        builder.call(f"window_{key}", ReadWindow, {"slots": "slots", "keys": keys, "values": values}, read)
        return read | {"mask": f"mask_{SLIDING}"}
    if builder.shape_of(keys)[2] == length:
        return {"keys": keys, "values": values, "mask": "mask"}
    read["mask"] = f"mask_{FULL}"
    inputs = {"mask": "mask", "keys": keys, "values": values}
    builder.call(f"prefix_{key}_{length}", lambda: ReadPrefix(length), inputs, read)
    return read


def trace_target(spec: TargetSpec, shape: GraphShape) -> TracedGraph:
    """The target's graph: prefill of every length, then decode and verify, whole first, then the shorter variants."""
    builder = GraphBuilder("target", single_buffer=shape.single_buffer, composites=shape.composites)
    passes: list[tuple[SignatureKind, int, int]] = [("prefill", n, shape.cache_length) for n in shape.prefill_lengths]
    for length in shape.attention_lengths:
        passes += [("decode", 1, length), ("verify", shape.num_draft_tokens + 1, length)]
    for kind, num_tokens, length in passes:
        _target_pass(builder, spec, shape.cache_length, kind, num_tokens, length)
    return builder.graph()


def _target_pass(
    builder: GraphBuilder,
    spec: TargetSpec,
    cache_length: int,
    kind: SignatureKind,
    num_tokens: int,
    length: int,
) -> None:
    caches = _cache_shapes(builder, spec, range(spec.num_caches), cache_length)
    builder.start(
        {
            "embeddings": ((1, num_tokens, spec.hidden_size), torch.float32),
            "per_layer_embeddings": ((1, num_tokens, spec.num_layers, spec.per_layer_size), torch.float32),
            "input_pos": ((num_tokens,), torch.int32),
            "mask": ((1, 1, num_tokens, cache_length), torch.float32),
            **{name: (cache, torch.float32) for name, cache in caches.items()},
        }
    )
    prefill = kind == "prefill"
    num_layers = spec.num_caches if prefill else spec.num_layers
    given = ("embeddings", "per_layer_embeddings", "input_pos", "mask")
    key = f"prologue_{num_layers}_{num_tokens}"
    prologue = functools.partial(TargetPrologue, spec, num_layers, single_buffer=builder.single_buffer)
    builder.call(key, prologue, {n: n for n in given})
    x = "embeddings"
    reads: dict[int, dict[str, str]] = {}
    for i in range(num_layers):
        x = _target_layer(builder, spec, i, x, num_tokens, length, reads, rows_only=prefill and i == num_layers - 1)
    outputs = {name: f"{name}_next" for name in caches}
    if not prefill:
        builder.call(f"head_{num_tokens}", lambda: TargetHead(spec), {"x": x})
        outputs |= {"logits": "logits", "activations": "activations"}
    name = f"prefill_{num_tokens}" if prefill else kind if length == cache_length else f"{kind}_{length}"
    builder.finish(name, kind, outputs, num_tokens=num_tokens, attention_length=length)


def _target_layer(
    builder: GraphBuilder,
    spec: TargetSpec,
    i: int,
    x: str,
    num_tokens: int,
    length: int,
    reads: dict[int, dict[str, str]],
    *,
    rows_only: bool,
) -> str:
    """Append layer i; returns the name of its output. `reads` keeps what was read of each cache: once per pass."""
    kind, width, cache = spec.layer_types[i], spec.intermediate_sizes[i], spec.cache_index(i)
    key, prefix = f"{kind}_{num_tokens}", f"layers.{i}."
    if i == cache:
        names = {"key_cache": f"kv_cache_k_{i}", "value_cache": f"kv_cache_v_{i}"}
        written = {n: f"{v}_next" for n, v in names.items()}
        places, rows = {"input_pos": "input_pos"}, OwnerRows
        if builder.single_buffer:
            places = {"key_start": "key_start", "value_start": "value_start", "params": PARAM_TENSOR}
            rows = DelegatedOwnerRows
        inputs = {"x": x, **places, **_rope(kind), **names}
        builder.call(f"rows_{key}", lambda: rows(spec, kind), inputs, written, prefix=prefix)
        if rows_only:
            return x
        reads[cache] = _read(builder, kind, written["key_cache"], written["value_cache"], key, length)
    attended = _attention(builder, spec, kind, x, reads[cache], key, length, i, prefix)
    inputs = {"x": x, "attended": attended, "per_layer_input": f"per_layer_input_{i}"}
    feed_forward = f"feed_forward_{width}_{num_tokens}"
    builder.call(feed_forward, lambda: TargetFeedForward(spec, width), inputs, {"x": f"x_{i}"}, prefix=prefix)
    return f"x_{i}"


def _attention(
    builder: GraphBuilder,
    spec: DecoderSpec,
    kind: LayerType,
    x: str,
    read: Mapping[str, str],
    key: str,
    length: int,
    i: int,
    prefix: str,
) -> str:
    """Append query and attention of layer i; returns the name of the attended value."""
    builder.call(
        f"query_{key}", lambda: ReaderQuery(spec, kind), {"x": x, **_rope(kind)}, {"query": f"query_{i}"}, prefix=prefix
    )
    attend = f"attend_{key}" + (f"_{length}" if kind == FULL else "")  # a window has one length
    inputs = {"query": f"query_{i}", **read}
    module = DelegatedAttend if builder.single_buffer else Attend
    builder.call(attend, lambda: module(spec, kind), inputs, {"attended": f"attended_{i}"}, prefix=prefix)
    return f"attended_{i}"


def trace_drafter(
    spec: DrafterSpec,
    target: TargetSpec,
    shape: GraphShape,
    *,
    position_offset: int,
    row_scales: bool,
) -> TracedGraph:
    """The drafter's graph; the full-length `draft` comes first, as LiteRT-LM runs signature 0. For a GPU it keeps to
    operations that one takes."""
    builder = GraphBuilder("drafter", single_buffer=shape.single_buffer, composites=shape.composites)
    for length in shape.attention_lengths:
        _draft_pass(builder, spec, target, shape.cache_length, length, position_offset, row_scales)
    return builder.graph()


def _draft_pass(
    builder: GraphBuilder,
    spec: DrafterSpec,
    target: TargetSpec,
    cache_length: int,
    length: int,
    position_offset: int,
    row_scales: bool,
) -> None:
    owners: dict[LayerType, int] = {kind: target.shared_cache_index(kind) for kind in (SLIDING, FULL)}
    caches = _cache_shapes(builder, target, owners.values(), cache_length)
    builder.start(
        {
            "activations": ((1, 1, 2 * spec.backbone_hidden_size), torch.float32),
            "input_pos": ((1,), torch.int32),
            "mask": ((1, 1, 1, cache_length), torch.float32),
            **{name: (cache, torch.float32) for name, cache in caches.items()},
        }
    )
    inputs = {n: n for n in ("activations", "input_pos", "mask")}
    prologue = functools.partial(DrafterPrologue, spec, position_offset, single_buffer=builder.single_buffer)
    builder.call("prologue", prologue, inputs)
    reads = {
        kind: _read(builder, kind, f"kv_cache_k_{owner}", f"kv_cache_v_{owner}", kind, length)
        for kind, owner in owners.items()
    }
    x = "x"
    for i, (kind, width) in enumerate(zip(spec.layer_types, spec.intermediate_sizes, strict=True)):
        prefix = f"model.layers.{i}."
        attended = _attention(builder, spec, kind, x, reads[kind], kind, length, i, prefix)
        feed_forward = {"x": x, "attended": attended}
        _feed_forward(builder, spec, width, feed_forward, f"x_{i}", prefix)
        x = f"x_{i}"
    builder.call(
        "head",
        lambda: DrafterHead(spec, row_scales=row_scales, delegated=builder.single_buffer),
        {"x": x},
        prefix={"norm": "model."},
    )
    name = "draft" if length == cache_length else f"draft_{length}"
    outputs = {n: n for n in ("logits", "projected_activations")}
    builder.finish(name, "draft", outputs, num_tokens=1, attention_length=length)


def _feed_forward(
    builder: GraphBuilder, spec: DecoderSpec, width: int, inputs: Mapping[str, str], output: str, prefix: str
) -> None:
    builder.call(f"feed_forward_{width}", lambda: FeedForward(spec, width), inputs, {"x": output}, prefix=prefix)


def trace_embedder(spec: TargetSpec, role: str) -> TracedGraph:
    """The graph of one token's embedding (`embedder`), or of its per-layer embeddings (`per_layer_embedder`)."""
    builder = GraphBuilder(role)
    builder.start({"token_ids": ((1, 1), torch.int32)})
    builder.call("embed", lambda: EMBEDDERS[role](spec), {"token_ids": "token_ids"})
    builder.finish("embed", "embed", {"embeddings": "embeddings"}, num_tokens=1, attention_length=0)
    return builder.graph()
