"""The values of nano, E2B and E4B."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mtp_export.arch.spec import (
    FULL,
    SLIDING,
    ClusteredHeadSpec,
    DrafterSpec,
    LayerType,
    PairSpec,
    RopeSpec,
    TargetSpec,
)

_SLIDING_ROPE = RopeSpec(theta=1e4, partial_rotary_factor=1.0)
_FULL_ROPE = RopeSpec(theta=1e6, partial_rotary_factor=0.25)
_DRAFTER_LAYERS: tuple[LayerType, ...] = (SLIDING, SLIDING, SLIDING, FULL)


def _pattern(num_layers: int, period: int) -> tuple[LayerType, ...]:
    """Every `period`-th layer has full attention."""
    return tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(num_layers))


_E2B_TARGET = TargetSpec(
    vocab_size=262144,
    hidden_size=1536,
    layer_types=_pattern(35, 5),
    intermediate_sizes=(6144,) * 15 + (12288,) * 20,
    num_heads=8,
    num_kv_heads=1,
    head_dim=256,
    global_head_dim=512,
    sliding_window=512,
    sliding_rope=_SLIDING_ROPE,
    full_rope=_FULL_ROPE,
    rms_norm_eps=1e-6,
    num_kv_shared_layers=20,
    per_layer_size=256,
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
    layer_types=_DRAFTER_LAYERS,
    intermediate_sizes=(2048,) * 4,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    global_head_dim=512,
    sliding_window=512,
    sliding_rope=_SLIDING_ROPE,
    full_rope=_FULL_ROPE,
    rms_norm_eps=1e-6,
    backbone_hidden_size=1536,
    head=ClusteredHeadSpec(num_centroids=2048, top_k=32, vocab_size=262144),
)
E2B = PairSpec(
    name="e2b",
    target=_E2B_TARGET,
    drafter=_E2B_DRAFTER,
    target_id="google/gemma-4-E2B-it",
    drafter_id="google/gemma-4-E2B-it-assistant",
    cache_length=4096,
    num_draft_tokens=3,
    prefill_lengths=(16, 128, 1024),
    prefix_lengths=(1024,),
)
E4B = PairSpec(
    name="e4b",
    target=dataclasses.replace(
        _E2B_TARGET,
        hidden_size=2560,
        layer_types=_pattern(42, 6),
        intermediate_sizes=(10240,) * 42,
        num_kv_heads=2,
        num_kv_shared_layers=18,
    ),
    drafter=dataclasses.replace(_E2B_DRAFTER, num_kv_heads=2, backbone_hidden_size=2560),
    target_id="google/gemma-4-E4B-it",
    drafter_id="google/gemma-4-E4B-it-assistant",
    cache_length=4096,
    num_draft_tokens=3,
    prefill_lengths=(16, 128, 1024),
    prefix_lengths=(1024,),
)
NANO = PairSpec(
    name="nano",
    target=dataclasses.replace(
        _E2B_TARGET,
        vocab_size=4096,
        hidden_size=256,
        layer_types=_pattern(10, 5),
        intermediate_sizes=(512,) * 5 + (1024,) * 5,
        num_heads=4,
        head_dim=64,
        global_head_dim=128,
        sliding_window=128,
        num_kv_shared_layers=5,
        per_layer_size=32,
        vocab_size_per_layer_input=4096,
        max_position_embeddings=4096,
    ),
    drafter=dataclasses.replace(
        _E2B_DRAFTER,
        vocab_size=4096,
        hidden_size=128,
        intermediate_sizes=(256,) * 4,
        head_dim=64,
        global_head_dim=128,
        sliding_window=128,
        backbone_hidden_size=256,
        head=ClusteredHeadSpec(num_centroids=128, top_k=24, vocab_size=4096),
    ),
    target_id="",  # embedded in the package
    drafter_id="",
    cache_length=1024,
    num_draft_tokens=4,
    prefill_lengths=(16, 128),
    prefix_lengths=(256, 512, 1024, 2048),
)
PAIRS: Mapping[str, PairSpec] = {pair.name: pair for pair in (NANO, E2B, E4B)}
