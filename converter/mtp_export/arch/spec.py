"""The architecture as data: frozen, keyword-only, without defaults."""

from __future__ import annotations

import dataclasses
from typing import Literal

LayerType = Literal["sliding_attention", "full_attention"]
SLIDING: LayerType = "sliding_attention"
FULL: LayerType = "full_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of one layer type; `partial_rotary_factor` < 1 leaves the higher frequencies unrotated."""

    theta: float
    partial_rotary_factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """What target and drafter have in common: a stack of Gemma 4 decoder layers."""

    vocab_size: int
    hidden_size: int
    layer_types: tuple[LayerType, ...]
    intermediate_sizes: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    global_head_dim: int
    sliding_window: int
    sliding_rope: RopeSpec
    full_rope: RopeSpec
    rms_norm_eps: float

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    def head_dim_of(self, layer_type: LayerType) -> int:
        """Head size of a layer type: full-attention layers have their own."""
        return self.global_head_dim if layer_type == FULL else self.head_dim

    def rope_of(self, layer_type: LayerType) -> RopeSpec:
        return self.full_rope if layer_type == FULL else self.sliding_rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSpec(DecoderSpec):
    """The big model. The last `num_kv_shared_layers` layers own no KV cache; they read the cache of the last layer
    of their own type before them."""

    num_kv_shared_layers: int
    per_layer_size: int
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
    def num_caches(self) -> int:
        """Number of layers that own a KV cache: the first ones."""
        return self.num_layers - self.num_kv_shared_layers

    def cache_index(self, layer: int) -> int:
        """Index of the KV cache that `layer` reads: its own, or the last one of its type."""
        if layer < self.num_caches:
            return layer
        return self.shared_cache_index(self.layer_types[layer])

    def shared_cache_index(self, layer_type: LayerType) -> int:
        """Index of the last cache of a layer type: what KV-shared layers and the drafter read."""
        return max(i for i in range(self.num_caches) if self.layer_types[i] == layer_type)

    def cache_shape(self, index: int, cache_length: int) -> tuple[int, int, int, int]:
        """Shape [1, KV heads, S, D] of each of the two tensors of cache `index`."""
        return (1, self.num_kv_heads, cache_length, self.head_dim_of(self.layer_types[index]))


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSpec:
    """A target and the drafter that fits it, the published ids that they come from, and the default sizes of their
    graphs."""

    name: str
    target: TargetSpec
    drafter: DrafterSpec
    target_id: str
    drafter_id: str
    cache_length: int
    num_draft_tokens: int
    prefill_lengths: tuple[int, ...]
    prefix_lengths: tuple[int, ...]
