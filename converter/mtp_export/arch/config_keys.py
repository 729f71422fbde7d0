"""The keys of a config.json: each is one of three.

It changes the computation: it is read, with transformers' default where it is left out, and a value that we do not
implement is an error that names it. It is bookkeeping of transformers: it is ignored. It is neither: transformers
ignores it, and so do we, but it is reported. tests/unit/test_config_keys.py compares all of it with transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtp_export.arch.spec import FULL, SLIDING

# Keys of a text_config that are read, with the values that transformers' Gemma4TextConfig (5.22) gives them where they
# are left out. Where that is None, None has a meaning of its own.
TEXT_DEFAULTS: Mapping[str, Any] = {
    "attention_bias": False,
    "attention_k_eq_v": False,
    "bos_token_id": 2,
    "enable_moe_block": False,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 9216,
    "is_causal": True,
    "layer_types": None,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_text",
    "num_attention_heads": 8,
    "num_hidden_layers": 30,
    "num_key_value_heads": 4,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "partial_rotary_factor": None,
    "per_layer_config": None,
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": None,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
    "use_double_wide_mlp": False,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}
DRAFTER_DEFAULTS: Mapping[str, Any] = {
    "backbone_hidden_size": 1536,
    "centroid_intermediate_top_k": 32,
    "num_centroids": 2048,
    "tie_word_embeddings": True,
    "use_ordered_embeddings": False,
}
# What transformers writes of itself, of training, of kernels and of other modalities; sizes of experts mean nothing
# while enable_moe_block is false.
BOOKKEEPING = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "audio_config",
        "audio_token_id",
        "auto_map",
        "boa_token_id",
        "boa_token_index",
        "boi_token_id",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eoa_token_id",
        "eoa_token_index",
        "eoi_token_id",
        "eoi_token_index",
        "eos_token_id",
        "expert_intermediate_size",
        "experts_implementation",
        "id2label",
        "image_token_id",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "moe_intermediate_size",
        "name_or_path",
        "num_experts",
        "num_global_key_value_heads",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "text_config",
        "tie_last_hidden_states",
        "tie_word_embeddings",
        "top_k_experts",
        "torch_dtype",
        "transformers_version",
        "transformers_weights",
        "use_cache",
        "video_token_id",
        "vision_config",
        "vision_soft_tokens_per_image",
    ]
)
# Of the keys that are read, those with one value that we implement, and what another one would be.
ONE_VALUE: Mapping[str, tuple[Any, str]] = {
    "attention_bias": (False, "attention with biases"),
    "attention_k_eq_v": (False, "keys that are the values too, as the 12B and the 31B have them,"),
    "enable_moe_block": (False, "a mixture of experts, as the 26B has it,"),
    "hidden_activation": ("gelu_pytorch_tanh", "another activation"),
    "is_causal": (True, "attention to later tokens"),
    "rope_scaling": (None, "rescaled positions"),
    "use_bidirectional_attention": (None, "attention to later tokens, as the 26B and the 31B have it for images,"),
}
# Model types that a user may well have, by what they are.
OTHER_MODELS = {
    "gemma4_unified": "Gemma 4 12B",
    "gemma4_unified_text": "Gemma 4 12B",
    "gemma4_unified_assistant": "the drafter of Gemma 4 12B",
    "gemma3n": "Gemma 3n",
    "gemma3n_text": "Gemma 3n",
    "gemma3": "Gemma 3",
    "gemma3_text": "Gemma 3",
    "gemma2": "Gemma 2",
}


DEFAULT_ROPES: Mapping[str, Any] = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}


_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"})


def unknown_keys(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of a config.json that say something and that neither transformers nor we read.

    Those of a nested object come with a dot between.
    """
    if "text_config" not in values:
        return _unknown_in_text(values, "")
    known = BOOKKEEPING | {"is_causal"} | ({*DRAFTER_DEFAULTS} if "backbone_hidden_size" in values else set())
    outer = tuple(sorted(key for key, value in values.items() if key not in known and value is not None))
    text = values["text_config"]
    return outer + (_unknown_in_text(text, "text_config.") if isinstance(text, dict) else ())


def _unknown_in_text(text: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
    known = BOOKKEEPING | TEXT_DEFAULTS.keys()
    keys = [f"{prefix}{key}" for key, value in sorted(text.items()) if key not in known and value is not None]
    ropes = text.get("rope_parameters")
    for layer_type, rope in sorted(ropes.items()) if isinstance(ropes, dict) else ():
        if isinstance(rope, dict):
            keys += [f"{prefix}rope_parameters.{layer_type}.{key}" for key in sorted(rope.keys() - _ROPE_KEYS)]
    return tuple(keys)
