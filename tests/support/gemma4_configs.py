"""config.json of the published pairs, as facts about them: written down here, not read from the code under test."""

from __future__ import annotations

import copy
from typing import Any

from mtp_export.arch.spec import LayerType

S: LayerType = "sliding_attention"
F: LayerType = "full_attention"

_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "eos_token_id": 1,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_text",
    "num_experts": None,
    "num_global_key_value_heads": None,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        F: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        S: {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "vocab_size": 262144,
}


def _target(text: dict[str, Any]) -> dict[str, Any]:
    of_target = {"final_logit_softcapping": 30.0, "num_attention_heads": 8}
    of_target |= {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144}
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": {"model_type": "gemma4_audio"},
        "audio_token_id": 258881,
        "boa_token_id": 256000,
        "boi_token_id": 255999,
        "dtype": "bfloat16",
        "eoi_token_id": 258882,
        "eos_token_id": [1, 106],
        "image_token_id": 258880,
        "model_type": "gemma4",
        "text_config": _TEXT | of_target | text,
        "tie_word_embeddings": True,
        "transformers_version": "5.5.0",
        "vision_config": {"model_type": "gemma4_vision"},
        "vision_soft_tokens_per_image": 280,
    }


def _drafter(backbone_hidden_size: int, num_kv_heads: int) -> dict[str, Any]:
    of_drafter = {
        "final_logit_softcapping": None,
        "hidden_size": 256,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 2048,
        "layer_types": [S, S, S, F],
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": num_kv_heads,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": False,
        "vocab_size_per_layer_input": 0,
    }
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": backbone_hidden_size,
        "centroid_intermediate_top_k": 32,
        "dtype": "bfloat16",
        "model_type": "gemma4_assistant",
        "num_centroids": 2048,
        "text_config": _TEXT | of_drafter,
        "tie_word_embeddings": True,
        "transformers_version": "5.7.0",
        "use_ordered_embeddings": True,
    }


_TARGETS = {
    "e2b": _target(
        {
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "layer_types": [S, S, S, S, F] * 7,
            "num_hidden_layers": 35,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True,
        }
    ),
    "e4b": _target(
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "layer_types": [S, S, S, S, S, F] * 7,
            "num_hidden_layers": 42,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 18,
            "use_double_wide_mlp": False,
        }
    ),
}
_DRAFTERS = {"e2b": _drafter(1536, 1), "e4b": _drafter(2560, 2)}


def target_config(model: str) -> dict[str, Any]:
    """Return a fresh config.json of the published target."""
    return copy.deepcopy(_TARGETS[model])


def drafter_config(model: str) -> dict[str, Any]:
    """Return a fresh config.json of the published drafter."""
    return copy.deepcopy(_DRAFTERS[model])
