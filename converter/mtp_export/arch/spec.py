"""The architecture as data: frozen, keyword-only, without defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

LayerType = Literal["sliding_attention", "full_attention"]
SLIDING: LayerType = "sliding_attention"
FULL: LayerType = "full_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of one layer type; `partial_rotary_factor` < 1 leaves the higher frequencies unrotated."""

    theta: float
    partial_rotary_factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """A mixture of experts in the place of one feed-forward block. No graph has one yet."""

    num_experts: int
    top_k: int
    intermediate_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer.

    window: positions that a query sees, its own included; None: all of them.
    cache: index of the KV cache that the layer writes, if `owns_cache`, or else reads; None in a drafter, which reads
        the target's.
    per_layer: size of the layer's own input; None: it has none.
    experts: None: the layer has one feed-forward block.
    keys_are_values: one projection gives both. No graph has such a layer yet.
    """

    kind: LayerType
    intermediate_size: int
    head_dim: int
    num_kv_heads: int
    rope: RopeSpec
    window: int | None
    cache: int | None
    owns_cache: bool
    per_layer: int | None
    experts: ExpertsSpec | None
    keys_are_values: bool

    @property
    def attention(self) -> tuple[object, ...]:
        """What layers of one kind have in common."""
        return self.head_dim, self.num_kv_heads, self.rope, self.window, self.keys_are_values


def with_caches(layers: Sequence[LayerSpec], num_shared: int) -> tuple[LayerSpec, ...]:
    """Return layers with their caches: the last `num_shared` own none, and read that of the last layer of their kind
    before them.

    Raises:
        ValueError: there is no such layer.
    """
    owners = range(len(layers) - num_shared)
    last = {layers[i].kind: i for i in owners}
    if missing := {layer.kind for layer in layers} - last.keys():
        raise ValueError(f"no cache for layers of {sorted(missing)}: all of them share one")
    return tuple(
        dataclasses.replace(layer, cache=i if i in owners else last[layer.kind], owns_cache=i in owners)
        for i, layer in enumerate(layers)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """What target and drafter have in common: a stack of Gemma 4 decoder layers."""

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    num_heads: int
    rms_norm_eps: float

    def __post_init__(self) -> None:
        """Check that layers of one kind attend alike: they share their part of a graph.

        Raises:
            ValueError: two differ.
        """
        kinds = self.kinds
        for number, layer in enumerate(self.layers):
            first = kinds[layer.kind]
            if layer.attention != first.attention:
                raise ValueError(f"layer {number} attends as {layer.attention}, the first one as {first.attention}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def layer_types(self) -> tuple[LayerType, ...]:
        return tuple(layer.kind for layer in self.layers)

    @property
    def kinds(self) -> Mapping[LayerType, LayerSpec]:
        """The first layer of each kind, in the order of their names: all of a kind attend as it does."""
        first = {layer.kind: layer for layer in reversed(self.layers)}
        return {kind: first[kind] for kind in sorted(first)}

    def visible(self, layer: LayerSpec) -> int | None:
        """Return how many positions a query of `layer` sees, its own included; None: all of them."""
        return layer.window

    def values(self) -> dict[str, Any]:
        """Return the model's sizes by the names that manifests and messages have for them.

        Those of a kind of layers that the model does not have are None.
        """
        sliding, full = self.kinds.get(SLIDING), self.kinds.get(FULL)
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "layer_types": self.layer_types,
            "intermediate_sizes": tuple(layer.intermediate_size for layer in self.layers),
            "num_heads": self.num_heads,
            "num_kv_heads": self._one("num_kv_heads"),
            "head_dim": sliding and sliding.head_dim,
            "global_head_dim": full and full.head_dim,
            "sliding_window": sliding and sliding.window,
            "sliding_rope": sliding and sliding.rope,
            "full_rope": full and full.rope,
            "rms_norm_eps": self.rms_norm_eps,
        }

    def as_manifest(self) -> dict[str, Any]:
        """Return what a manifest holds of the model, in plain values."""
        values = self.values().items()
        return {n: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for n, v in values}  # type: ignore[arg-type]

    def _one(self, name: str) -> Any:
        """Return the value that all layers have.

        Raises:
            ValueError: they differ.
        """
        values = {getattr(layer, name) for layer in self.layers}
        if len(values) != 1:
            raise ValueError(f"{name} is {sorted(values)}, expected one value for all layers")
        return values.pop()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSpec(DecoderSpec):
    """The big model. The layers that own a KV cache come first, so a cache has the number of its layer."""

    vocab_size_per_layer_input: int
    final_logit_softcapping: float
    max_position_embeddings: int
    pad_token_id: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]

    @property
    def of_graphs(self) -> TargetSpec:
        """What graphs depend on: no token ids and no longest position, which a fine-tune may change."""
        return dataclasses.replace(self, max_position_embeddings=0, pad_token_id=0, bos_token_id=0, eos_token_ids=())

    @property
    def per_layer_size(self) -> int:
        """Size of each layer's own input."""
        size: int = self._one("per_layer")
        return size

    @property
    def num_caches(self) -> int:
        """Number of layers that own a KV cache: the first ones."""
        return sum(layer.owns_cache for layer in self.layers)

    def shared_cache_index(self, layer_type: LayerType) -> int:
        """Return the index of the last cache of a layer type: what KV-shared layers and the drafter read."""
        return max(i for i in range(self.num_caches) if self.layers[i].kind == layer_type)

    def cache_shape(self, index: int, cache_length: int) -> tuple[int, int, int, int]:
        """Return the shape [1,G,S,D] of each of the two tensors of cache `index`."""
        layer = self.layers[index]
        return (1, layer.num_kv_heads, cache_length, layer.head_dim)

    def values(self) -> dict[str, Any]:
        """Return the model's sizes, as for any decoder, and what a target alone has."""
        return super().values() | {
            "num_kv_shared_layers": self.num_layers - self.num_caches,
            "per_layer_size": self.per_layer_size,
            "vocab_size_per_layer_input": self.vocab_size_per_layer_input,
            "final_logit_softcapping": self.final_logit_softcapping,
            "max_position_embeddings": self.max_position_embeddings,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": self.eos_token_ids,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusteredHeadSpec:
    """Two-stage logit lookup: the vocabulary is split into `num_centroids` clusters of equal size; only the tokens of
    the `top_k` best clusters are scored (config: `centroid_intermediate_top_k`)."""

    num_centroids: int
    top_k: int
    vocab_size: int

    @property
    def cluster_size(self) -> int:
        return self.vocab_size // self.num_centroids

    @property
    def num_candidates(self) -> int:
        return self.top_k * self.cluster_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterSpec(DecoderSpec):
    """The MTP model: query-only layers over the target's caches."""

    backbone_hidden_size: int
    head: ClusteredHeadSpec

    def visible(self, layer: LayerSpec) -> int | None:
        """Return how many positions a query of `layer` sees; None: all of them.

        That is one more than in the target: transformers' bidirectional mask is inclusive.
        """
        return None if layer.window is None else layer.window + 1

    def values(self) -> dict[str, Any]:
        """Return the model's sizes, as for any decoder, and what a drafter alone has."""
        return super().values() | {"backbone_hidden_size": self.backbone_hidden_size, "head": self.head}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphSizes:
    """Sizes of a pair's graphs, in tokens: a choice of the export, and none of the models.

    longest_context: what a bundle can be opened at whose context is chosen when it is loaded. context_length: what one
    gets who chooses none, and the size of every other bundle. ring_length: slots of sliding layers' caches.
    """

    longest_context: int
    context_length: int
    num_draft_tokens: int
    prefill_lengths: tuple[int, ...]
    ring_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSpec:
    """A target and the drafter that fits it, the published ids that they come from, and the default sizes of their
    graphs."""

    name: str
    target: TargetSpec
    drafter: DrafterSpec
    target_id: str
    drafter_id: str
    sizes: GraphSizes
