"""The values of nano, E2B and E4B."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mtp_export.arch.spec import (
    FULL,
    SLIDING,
    ClusteredHeadSpec,
    DrafterSpec,
    GraphSizes,
    LayerSpec,
    LayerType,
    PairSpec,
    RopeSpec,
    TargetSpec,
    with_caches,
)

_SLIDING_LAYER = LayerSpec(
    kind=SLIDING,
    intermediate_size=6144,
    head_dim=256,
    num_kv_heads=1,
    rope=RopeSpec(theta=1e4, partial_rotary_factor=1.0),
    window=512,
    cache=None,
    owns_cache=False,
    per_layer=256,
    experts=None,
    keys_are_values=False,
)
_FULL_LAYER = dataclasses.replace(
    _SLIDING_LAYER, kind=FULL, head_dim=512, rope=RopeSpec(theta=1e6, partial_rotary_factor=0.25), window=None
)
_DRAFTER_LAYERS: tuple[LayerType, ...] = (SLIDING, SLIDING, SLIDING, FULL)


def _pattern(num_layers: int, period: int) -> tuple[LayerType, ...]:
    """Return the layer types of a model in which every `period`-th layer has full attention."""
    return tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(num_layers))


def _layers(kinds: Sequence[LayerType], widths: Sequence[int], **changes: Any) -> list[LayerSpec]:
    """Return layers of these types and intermediate sizes that otherwise differ from E2B's by `changes`."""
    of_kind = {SLIDING: _SLIDING_LAYER, FULL: _FULL_LAYER}
    pairs = zip(kinds, widths, strict=True)
    return [dataclasses.replace(of_kind[kind], intermediate_size=width, **changes) for kind, width in pairs]


def _at_nano_size(layers: Sequence[LayerSpec]) -> list[LayerSpec]:
    """Return layers with nano's heads and window."""
    return [
        dataclasses.replace(
            layer,
            head_dim=64 if layer.kind == SLIDING else 128,
            window=128 if layer.kind == SLIDING else None,
        )
        for layer in layers
    ]


_E2B_TARGET = TargetSpec(
    vocab_size=262144,
    hidden_size=1536,
    layers=with_caches(_layers(_pattern(35, 5), (6144,) * 15 + (12288,) * 20), num_shared=20),
    num_heads=8,
    rms_norm_eps=1e-6,
    vocab_size_per_layer_input=262144,
    final_logit_softcapping=30.0,
    max_position_embeddings=131072,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_ids=(1, 106),
)
_E2B_DRAFTER = DrafterSpec(
    vocab_size=262144,
    hidden_size=256,
    layers=tuple(_layers(_DRAFTER_LAYERS, (2048,) * 4, per_layer=None)),
    num_heads=4,
    rms_norm_eps=1e-6,
    backbone_hidden_size=1536,
    head=ClusteredHeadSpec(num_centroids=2048, top_k=32, vocab_size=262144),
)
_LARGE_SIZES = GraphSizes(
    longest_context=32768,
    context_length=4096,
    num_draft_tokens=3,
    prefill_lengths=(16, 128, 1024),
    ring_length=4096,
)
E2B = PairSpec(
    name="e2b",
    target=_E2B_TARGET,
    drafter=_E2B_DRAFTER,
    target_id="google/gemma-4-E2B-it",
    drafter_id="google/gemma-4-E2B-it-assistant",
    sizes=_LARGE_SIZES,
)
E4B = PairSpec(
    name="e4b",
    target=dataclasses.replace(
        _E2B_TARGET,
        hidden_size=2560,
        layers=with_caches(_layers(_pattern(42, 6), (10240,) * 42, num_kv_heads=2), num_shared=18),
    ),
    drafter=dataclasses.replace(
        _E2B_DRAFTER,
        layers=tuple(_layers(_DRAFTER_LAYERS, (2048,) * 4, num_kv_heads=2, per_layer=None)),
        backbone_hidden_size=2560,
    ),
    target_id="google/gemma-4-E4B-it",
    drafter_id="google/gemma-4-E4B-it-assistant",
    sizes=_LARGE_SIZES,
)
NANO = PairSpec(
    name="nano",
    target=dataclasses.replace(
        _E2B_TARGET,
        vocab_size=4096,
        hidden_size=256,
        layers=with_caches(
            _at_nano_size(_layers(_pattern(10, 5), (512,) * 5 + (1024,) * 5, per_layer=32)), num_shared=5
        ),
        num_heads=4,
        vocab_size_per_layer_input=4096,
        max_position_embeddings=4096,
    ),
    drafter=dataclasses.replace(
        _E2B_DRAFTER,
        vocab_size=4096,
        hidden_size=128,
        layers=tuple(_at_nano_size(_layers(_DRAFTER_LAYERS, (256,) * 4, per_layer=None))),
        backbone_hidden_size=256,
        head=ClusteredHeadSpec(num_centroids=128, top_k=24, vocab_size=4096),
    ),
    target_id="",  # embedded in the package
    drafter_id="",
    sizes=GraphSizes(
        longest_context=4096, context_length=1024, num_draft_tokens=4, prefill_lengths=(16, 128), ring_length=1024
    ),
)
PAIRS: Mapping[str, PairSpec] = {pair.name: pair for pair in (NANO, E2B, E4B)}
