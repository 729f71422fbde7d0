"""Specs: what a layer knows of itself, and what manifests hold of a model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from mtp_export.arch.published import NANO, PAIRS
from mtp_export.arch.spec import FULL, SLIDING, DecoderSpec, ExpertsSpec, LayerSpec, with_caches
from mtp_export.graph.walk import drafter_places, target_places

# What every manifest of nano has held so far: a bundle's bytes, and what runtimes read of it, hang on these.
SLIDING_ROPE = {"theta": 10000.0, "partial_rotary_factor": 1.0}
FULL_ROPE = {"theta": 1000000.0, "partial_rotary_factor": 0.25}
ATTENTION = {
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 128,
    "sliding_rope": SLIDING_ROPE,
    "full_rope": FULL_ROPE,
    "rms_norm_eps": 1e-06,
}
TARGET = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 2,
    "intermediate_sizes": [512] * 5 + [1024] * 5,
    **ATTENTION,
    "num_kv_shared_layers": 5,
    "per_layer_size": 32,
    "vocab_size_per_layer_input": 4096,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_ids": [1, 106],
}
DRAFTER = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"],
    "intermediate_sizes": [256] * 4,
    **ATTENTION,
    "backbone_hidden_size": 256,
    "head": {"num_centroids": 128, "top_k": 24, "vocab_size": 4096},
}


@pytest.mark.parametrize(
    ("spec", "expected"), [(NANO.target, TARGET), (NANO.drafter, DRAFTER)], ids=["target", "drafter"]
)
def test_a_manifest_holds_the_same_of_a_model_as_ever(spec: DecoderSpec, expected: dict[str, Any]) -> None:
    """Keys, their order and values."""
    assert json.dumps(spec.as_manifest()) == json.dumps(expected)


@pytest.mark.parametrize("model", PAIRS)
def test_a_layer_writes_its_own_cache_or_reads_the_last_one_of_its_kind(model: str) -> None:
    spec = PAIRS[model].target
    for number, layer in enumerate(spec.layers):
        assert layer.owns_cache == (number < spec.num_caches)
        assert layer.cache is not None
        assert layer.cache == (number if layer.owns_cache else spec.shared_cache_index(layer.kind))
        assert spec.layers[layer.cache].kind == layer.kind


def test_a_drafter_sees_one_position_more_than_its_target() -> None:
    """transformers' bidirectional mask is inclusive."""
    for spec, expected in ((NANO.target, 128), (NANO.drafter, 129)):
        assert {kind: spec.visible(layer) for kind, layer in spec.kinds.items()} == {SLIDING: expected, FULL: None}


def test_layers_of_one_kind_attend_alike() -> None:
    """They share their part of a graph, so a layer that differs would be computed as another one."""
    layers = list(NANO.target.layers)
    layers[2] = dataclasses.replace(layers[2], head_dim=96)
    with pytest.raises(ValueError, match="layer 2 attends as"):
        dataclasses.replace(NANO.target, layers=tuple(layers))


def test_a_kind_without_a_cache_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="no cache for layers of \\['full_attention'\\]"):
        with_caches(NANO.target.layers[:5], 1)


@pytest.mark.parametrize(
    "changes",
    [{"keys_are_values": True}, {"experts": ExpertsSpec(num_experts=8, top_k=2, intermediate_size=64)}],
    ids=["keys are values", "experts"],
)
def test_a_layer_that_no_graph_has_is_never_computed_as_another(changes: dict[str, Any]) -> None:
    def changed(layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        return tuple(dataclasses.replace(layer, **changes) for layer in layers)

    target = dataclasses.replace(NANO.target, layers=changed(NANO.target.layers))
    drafter = dataclasses.replace(NANO.drafter, layers=changed(NANO.drafter.layers))
    with pytest.raises(ValueError, match="no graph has a layer such as"):
        target_places(target)
    with pytest.raises(ValueError, match="no graph has a layer such as"):
        drafter_places(drafter, NANO.target)
