"""The two published config.json forms with nano's values, and the folders they are written to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.train_nano import nano_ids as ids

ROPE = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
}


def _text_config(**values: Any) -> dict[str, Any]:
    """Return a `gemma4_text` section: what target and drafter have in common, then `values`."""
    common: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": False,
        "bos_token_id": ids.BOS,
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "eos_token_id": ids.EOS,
        "expert_intermediate_size": None,
        "global_head_dim": 128,
        "head_dim": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "model_type": "gemma4_text",
        "num_attention_heads": 4,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_key_value_heads": 1,
        "pad_token_id": ids.PAD,
        "rms_norm_eps": 1e-6,
        "rope_parameters": ROPE,
        "sliding_window": 128,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": None,
        "use_cache": True,
        "vocab_size": ids.VOCAB_SIZE,
    }
    return common | values


MEDIA_TOKENS = {
    "audio_token_id": ids.AUDIO,
    "boa_token_id": ids.AUDIO_OPEN,
    "boi_token_id": ids.IMAGE_OPEN,
    "eoa_token_id": ids.AUDIO_CLOSE,
    "eoi_token_id": ids.IMAGE_CLOSE,
    "image_token_id": ids.IMAGE,
}

TARGET_CONFIG: dict[str, Any] = {
    **MEDIA_TOKENS,
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "dtype": "bfloat16",
    "eos_token_id": [ids.EOS, ids.TURN_CLOSE],
    "model_type": "gemma4",
    "text_config": _text_config(
        final_logit_softcapping=30.0,
        hidden_size=256,
        hidden_size_per_layer_input=32,
        intermediate_size=512,
        layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 2,
        num_hidden_layers=10,
        num_kv_shared_layers=5,
        use_double_wide_mlp=True,
        vocab_size_per_layer_input=4096,
    ),
    "tie_word_embeddings": True,
    "video_token_id": ids.VIDEO,
    "vision_config": None,
}

DRAFTER_CONFIG: dict[str, Any] = {
    **MEDIA_TOKENS,
    "architectures": ["Gemma4AssistantForCausalLM"],
    "backbone_hidden_size": 256,
    "centroid_intermediate_top_k": 24,
    "dtype": "bfloat16",
    "model_type": "gemma4_assistant",
    "num_centroids": 128,
    "text_config": _text_config(
        final_logit_softcapping=None,
        hidden_size=128,
        hidden_size_per_layer_input=0,
        intermediate_size=256,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        num_hidden_layers=4,
        num_kv_shared_layers=4,
        use_double_wide_mlp=False,
        vocab_size_per_layer_input=0,
    ),
    "tie_word_embeddings": True,
    "use_ordered_embeddings": True,
}

GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": ids.BOS,
    "do_sample": False,
    "eos_token_id": list(ids.STOP_IDS),
    "pad_token_id": ids.PAD,
}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as published files are written: two spaces, keys sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_configs(nano: Path) -> None:
    """Write the config files of target and drafter under `nano`."""
    write_json(nano / "target/config.json", TARGET_CONFIG)
    write_json(nano / "target/generation_config.json", GENERATION_CONFIG)
    write_json(nano / "drafter/config.json", DRAFTER_CONFIG)
