"""Which tensors a published pair stores: names, shapes, and how large their values are.

The text model; towers.py has the vision and audio towers.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Literal

from mtp_export.arch.spec import DecoderSpec, DrafterSpec, TargetSpec, with_caches

TARGET_PREFIX = "model.language_model."
TOKEN_ORDERING = "masked_embedding.token_ordering"

# Middle of the final norm's weights: rows of the head have about unit length, so this is the spread of the logits.
_LOGIT_SPREAD = 3.0
# A token's own embedding is one part in this many of the last hidden state: the head is tied, so a larger part makes
# tokens repeat themselves, those with large rows first (16 was too little for E2B).
_MIXING = 48.0


_ITEM_BYTES = {"I64": 8, "F32": 4, "I32": 4, "BF16": 2, "I8": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a checkpoint; `spread` is the standard deviation of a matrix, or the middle of a vector or of scales.

    `dtype` is safetensors' name. `bits` are those of integers, packed into words where it is I32; `values` are the
    constants.
    """

    name: str
    shape: tuple[int, ...]
    spread: float
    dtype: str = "BF16"
    content: Literal["normal", "permutation", "integers", "scales", "constant"] = "normal"
    bits: int = 0
    values: tuple[float, ...] = ()

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]

    @property
    def row_length(self) -> int:
        """Values in the last dimension; 1 of what is no matrix."""
        if len(self.shape) < 2:
            return 1
        return self.shape[-1] * 32 // self.bits if self.dtype == "I32" else self.shape[-1]

    @property
    def size_bytes(self) -> int:
        return self.item_bytes * math.prod(self.shape)


def at_depth(spec: TargetSpec, depth: Fraction) -> TargetSpec:
    """The target with a fraction of its layers, every width as it was: the last layers of those that own a cache, at
    least one of each type, and the last ones of those that share."""
    own = max(2, round(spec.num_caches * depth))
    shared = max(1, round((spec.num_layers - spec.num_caches) * depth))
    kept = [*range(spec.num_caches - own, spec.num_caches), *range(spec.num_layers - shared, spec.num_layers)]
    return dataclasses.replace(spec, layers=with_caches([spec.layers[i] for i in kept], shared))


def target_tensors(spec: TargetSpec, *, unused_caches: bool) -> list[StoredTensor]:
    """The text model in a multimodal file; with `unused_caches`, KV-shared layers carry keys and values that nothing
    reads, as the files without quantisation-aware training do."""
    hidden, per_layer = spec.hidden_size, spec.per_layer_size
    width = spec.num_layers * per_layer
    # Every norm of a branch's result is this large: then 3 branches a layer add up to _MIXING.
    branch = _MIXING / (3 * spec.num_layers) ** 0.5
    tensors = [
        matrix("embed_tokens", spec.vocab_size, hidden),
        matrix("embed_tokens_per_layer", spec.vocab_size_per_layer_input, width, spread=per_layer**-0.5),
        matrix("per_layer_model_projection", width, hidden),
        vector("per_layer_projection_norm", per_layer),
        vector("norm", hidden, _LOGIT_SPREAD),
    ]
    for layer in range(spec.num_layers):
        tensors += _layer(spec, layer, branch)
        if layer < spec.num_caches or unused_caches:
            tensors += _keys_and_values(spec, layer)
        tensors += [
            matrix(f"layers.{layer}.per_layer_input_gate", per_layer, hidden),
            matrix(f"layers.{layer}.per_layer_projection", hidden, per_layer),
            vector(f"layers.{layer}.post_per_layer_input_norm", hidden, branch),
        ]
    return [dataclasses.replace(tensor, name=TARGET_PREFIX + tensor.name) for tensor in tensors]


def drafter_tensors(spec: DrafterSpec) -> list[StoredTensor]:
    """Return the drafter's tensors: query-only layers, and the clustered head beside the tied embedding."""
    hidden, backbone = spec.hidden_size, spec.backbone_hidden_size
    tensors = [
        matrix("model.embed_tokens", spec.vocab_size, hidden),
        vector("model.norm", hidden, _LOGIT_SPREAD),
        matrix("pre_projection", hidden, 2 * backbone),
        matrix("post_projection", backbone, hidden),
        matrix("masked_embedding.centroids", spec.head.num_centroids, hidden),
        StoredTensor(name=TOKEN_ORDERING, shape=(spec.vocab_size,), spread=0.0, dtype="I64", content="permutation"),
    ]
    for layer in range(spec.num_layers):
        tensors += [dataclasses.replace(t, name=f"model.{t.name}") for t in _layer(spec, layer, 1.0)]
    return tensors


def _layer(spec: DecoderSpec, layer: int, branch: float) -> list[StoredTensor]:
    """Return what every layer of target and drafter has."""
    hidden, inner, name = spec.hidden_size, spec.layers[layer].intermediate_size, f"layers.{layer}"
    head_dim = spec.layers[layer].head_dim
    queries = spec.num_heads * head_dim
    return [
        vector(f"{name}.input_layernorm", hidden),
        matrix(f"{name}.self_attn.q_proj", queries, hidden),
        vector(f"{name}.self_attn.q_norm", head_dim),
        matrix(f"{name}.self_attn.o_proj", hidden, queries),
        vector(f"{name}.post_attention_layernorm", hidden, branch),
        vector(f"{name}.pre_feedforward_layernorm", hidden),
        matrix(f"{name}.mlp.gate_proj", inner, hidden),
        matrix(f"{name}.mlp.up_proj", inner, hidden),
        matrix(f"{name}.mlp.down_proj", hidden, inner),
        vector(f"{name}.post_feedforward_layernorm", hidden, branch),
        StoredTensor(name=f"{name}.layer_scalar", shape=(1,), spread=1.0),
    ]


def _keys_and_values(spec: DecoderSpec, layer: int) -> list[StoredTensor]:
    head_dim, name = spec.layers[layer].head_dim, f"layers.{layer}.self_attn"
    rows = spec.layers[layer].num_kv_heads * head_dim
    return [
        matrix(f"{name}.k_proj", rows, spec.hidden_size),
        matrix(f"{name}.v_proj", rows, spec.hidden_size),
        # The scores are not scaled by D^-0.5, so the norms do it; without that, random attention is chaotic.
        vector(f"{name}.k_norm", head_dim, head_dim**-0.5),
    ]


def matrix(name: str, rows: int, columns: int, spread: float | None = None) -> StoredTensor:
    """Scaled by its fan-in unless `spread` says otherwise."""
    return StoredTensor(name=f"{name}.weight", shape=(rows, columns), spread=spread or columns**-0.5)


def vector(name: str, length: int, middle: float = 1.0) -> StoredTensor:
    return StoredTensor(name=f"{name}.weight", shape=(length,), spread=middle)
