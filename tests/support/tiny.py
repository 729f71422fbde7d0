"""Tiny random pairs in transformers, and our modules loaded with their weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

from mtp_export.arch.published import NANO
from mtp_export.arch.spec import (
    FULL,
    SLIDING,
    ClusteredHeadSpec,
    DrafterSpec,
    LayerSpec,
    LayerType,
    TargetSpec,
    with_caches,
)
from mtp_export.graph.ir import run_signature
from mtp_export.graph.static import GraphShape, Ring, cache_shapes, trace_embedder, trace_target
from mtp_runtime.bundle.contract import PARAM_COUNT, PARAM_TENSOR, CacheName

ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


END_TOKEN = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny:
    """The varying part of a tiny pair, which is nano with other sizes."""

    num_kv_heads: int = 1
    double_wide: bool = True
    sliding_window: int = 8
    single_buffer: bool = False
    ring_length: int | None = None

    def shape(self, cache_length: int, num_draft_tokens: int, prefill_lengths: tuple[int, ...] = ()) -> GraphShape:
        return GraphShape(
            cache_length=cache_length,
            num_draft_tokens=num_draft_tokens,
            prefill_lengths=prefill_lengths,
            ring=None if self.ring_length is None else Ring(length=self.ring_length, end_token=END_TOKEN),
            single_buffer=self.single_buffer,
        )

    @property
    def target_spec(self) -> TargetSpec:
        widths = (48, 48, 48) + (96 if self.double_wide else 48,) * 3
        kinds = (SLIDING, SLIDING, FULL) * 2
        layers = [self._layer(kind, width, per_layer=8) for kind, width in zip(kinds, widths, strict=True)]
        return dataclasses.replace(
            NANO.target,
            vocab_size=128,
            hidden_size=32,
            layers=with_caches(layers, 3),
            vocab_size_per_layer_input=128,
            max_position_embeddings=1024,
            eos_token_ids=(END_TOKEN,),
        )

    @property
    def drafter_spec(self) -> DrafterSpec:
        kinds = (SLIDING, SLIDING, SLIDING, FULL)
        return dataclasses.replace(
            NANO.drafter,
            vocab_size=128,
            hidden_size=24,
            layers=tuple(self._layer(kind, 40, per_layer=None) for kind in kinds),
            backbone_hidden_size=32,
            head=ClusteredHeadSpec(num_centroids=16, top_k=4, vocab_size=128),
        )

    def _layer(self, kind: LayerType, width: int, *, per_layer: int | None) -> LayerSpec:
        sliding = kind == SLIDING
        return dataclasses.replace(
            NANO.drafter.kinds[kind],  # its caches are no layer's own
            intermediate_size=width,
            head_dim=16 if sliding else 32,
            num_kv_heads=self.num_kv_heads,
            window=self.sliding_window if sliding else None,
            per_layer=per_layer,
        )


def _text_config(spec: TargetSpec | DrafterSpec, **extra: Any) -> Gemma4TextConfig:
    # Its keyword arguments are made at run time, and its types do not know them all.
    make: Any = Gemma4TextConfig
    config: Gemma4TextConfig = make(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.layers[0].intermediate_size,
        num_hidden_layers=spec.num_layers,
        layer_types=list(spec.layer_types),
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.kinds[FULL].num_kv_heads,
        head_dim=spec.kinds[SLIDING].head_dim,
        global_head_dim=spec.kinds[FULL].head_dim,
        sliding_window=spec.kinds[SLIDING].window,
        max_position_embeddings=1024,
        rope_parameters=ROPE,
        **extra,
    )
    return config


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Give every weight, norms and layer scalars included, a value that shows when it is forgotten."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            # In a trained model these do the work of 1/sqrt(D); without it random attention is chaotic, and four
            # chained steps amplify the rounding of the first a thousandfold.
            tensor.data.uniform_(0.3, 0.6, generator=generator)
        elif name.endswith(("norm.weight", "layernorm.weight", "layer_scalar")):
            tensor.data.uniform_(0.6, 1.4, generator=generator)
        elif tensor.dim() == 2:
            tensor.data.normal_(0.0, tensor.shape[1] ** -0.5, generator=generator)


def hf_target(tiny: Tiny, seed: int = 0) -> Gemma4ForCausalLM:
    spec = tiny.target_spec
    config = _text_config(
        spec,
        num_kv_shared_layers=spec.num_layers - spec.num_caches,
        use_double_wide_mlp=tiny.double_wide,
        hidden_size_per_layer_input=spec.per_layer_size,
        vocab_size_per_layer_input=spec.vocab_size_per_layer_input,
        final_logit_softcapping=spec.final_logit_softcapping,
    )
    model = Gemma4ForCausalLM(config)
    model.train(False)
    _randomise(model, seed)
    return model


def hf_drafter(tiny: Tiny, seed: int = 1) -> Gemma4AssistantForCausalLM:
    spec = tiny.drafter_spec
    text = _text_config(spec, num_kv_shared_layers=4, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
    config = Gemma4AssistantConfig(
        text_config=text,
        backbone_hidden_size=spec.backbone_hidden_size,
        use_ordered_embeddings=True,
        num_centroids=spec.head.num_centroids,
        centroid_intermediate_top_k=spec.head.top_k,
    )
    model = Gemma4AssistantForCausalLM(config)
    model.train(False)
    _randomise(model, seed)
    order = torch.randperm(spec.vocab_size, generator=torch.Generator().manual_seed(seed))
    assert model.masked_embedding is not None
    model.masked_embedding.token_ordering.copy_(order)
    return model


def target_weights(model: Gemma4ForCausalLM) -> dict[str, torch.Tensor]:
    return {k.removeprefix("model."): v for k, v in model.state_dict().items()}


def drafter_weights(spec: DrafterSpec, model: Gemma4AssistantForCausalLM) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    order = state["masked_embedding.token_ordering"]
    clusters = spec.head.num_centroids
    state["masked_embedding.token_ordering"] = order.to(torch.int32).reshape(clusters, -1)
    state["masked_embedding.may_draft"] = torch.ones(clusters, spec.head.cluster_size)
    state["masked_embedding.token_places"] = torch.argsort(order).to(torch.int32)
    state["masked_embedding.table"] = state["model.embed_tokens.weight"][order].reshape(clusters, -1)
    return state


# What a GPU's kernels are told; torch computes every slot.
PARAMS = torch.zeros(1, 1, 1, PARAM_COUNT, dtype=torch.int32)


def causal_mask(cache_length: int, position: int, num_tokens: int) -> torch.Tensor:
    """Additive, over the whole cache. Shapes: -> [1,1,T,S]"""
    slots, queries = torch.arange(cache_length), torch.arange(position, position + num_tokens)
    return torch.where(slots[None] <= queries[:, None], 0.0, -1e9)[None, None]


class StaticTarget:
    """The traced target with caches of a fixed length, driven like a runtime does."""

    def __init__(self, tiny: Tiny, model: Gemma4ForCausalLM, cache_length: int, pass_lengths: set[int]) -> None:
        self.spec, self.cache_length, self.weights = tiny.target_spec, cache_length, target_weights(model)
        spec = self.spec
        self.embedders = [trace_embedder(spec, role) for role in ("embedder", "per_layer_embedder")]
        # One graph per length of a pass; a verify pass of one token is a decode.
        self.graphs = {n: trace_target(spec, tiny.shape(cache_length, n - 1, (n,))) for n in pass_lengths}
        # Garbage, not zeros: what is not filled must not matter.
        generator = torch.Generator().manual_seed(9)
        shapes = cache_shapes(spec, tiny.shape(cache_length, 1))
        self.caches = {str(name): torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        self.single_buffer = tiny.single_buffer

    def rows_of(self, name: CacheName) -> torch.Tensor:
        """A layer's cache as rows. Shapes: -> [1,G,S,D]"""
        cache, full = self.caches[str(name)], self.spec.layers[name.index].kind == FULL
        return cache.transpose(2, 3) if name.part == "v" and (full or self.single_buffer) else cache

    def embed(self, token: torch.Tensor) -> list[torch.Tensor]:
        """Shapes: scalar -> [1,1,H] and [1,1,L,P]"""
        ids = {"token_ids": token.reshape(1, 1)}
        return [run_signature(g, g.signatures[0], self.weights, ids)["embeddings"] for g in self.embedders]

    def __call__(self, ids: torch.Tensor, position: int, name: str = "verify") -> dict[str, torch.Tensor]:
        """Run one pass over T tokens and keep its caches. Shapes: ids [T] -> all values of the signature."""
        graph = self.graphs[len(ids)]
        traced = next(t for t in graph.signatures if t.signature.name == name)
        embedded = [self.embed(token) for token in ids]
        inputs = {
            "embeddings": torch.cat([e[0] for e in embedded], 1),
            "per_layer_embeddings": torch.cat([e[1] for e in embedded], 1),
            "input_pos": torch.arange(position, position + len(ids), dtype=torch.int32),
            "mask": causal_mask(self.cache_length, position, len(ids)),
        }
        if self.single_buffer:
            inputs[PARAM_TENSOR] = PARAMS
        values = run_signature(graph, traced, self.weights, inputs | self.caches)
        self.caches = {cache: values[CacheName.parse(cache).next] for cache in self.caches}
        return values
