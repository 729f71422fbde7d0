"""The files beside the weights: config.json as it is published, and a tokenizer that has every id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtp_export.arch.spec import FULL, SLIDING, DecoderSpec, DrafterSpec, TargetSpec
from mtp_export.embedded import EMBEDDED
from tools.synthesize import quantised

_STOP_BESIDE_EOS = 50  # generation_config.json of the published targets stops here too


def write_target_texts(folder: Path, spec: TargetSpec, variant: str = "plain") -> None:
    """Write everything but the weights of a target."""
    config = target_config(spec)
    if variant in quantised.VARIANTS:
        config["quantization_config"] = quantised.quantization_config(variant, spec.per_layer_size)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": spec.bos_token_id,
            "do_sample": False,
            "eos_token_id": [*spec.eos_token_ids, _STOP_BESIDE_EOS],
            "pad_token_id": spec.pad_token_id,
        },
    )
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((EMBEDDED / "target" / name).read_bytes())
    (folder / "tokenizer.json").write_text(tokenizer_json(spec.vocab_size), encoding="utf-8")


def write_drafter_texts(folder: Path, spec: DrafterSpec, max_position_embeddings: int) -> None:
    """Write everything but the weights of a drafter."""
    _write_json(folder / "config.json", drafter_config(spec, max_position_embeddings))


def tokenizer_json(vocab_size: int) -> str:
    """nano's tokenizer, whose special tokens have the published ids; the ids above its own get a name, so that
    whatever a model says can be shown."""
    document = json.loads((EMBEDDED / "target" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    vocabulary |= {f"<unused{i}>": i for i in range(len(vocabulary), vocab_size)}
    return json.dumps(document, ensure_ascii=False)


def target_config(spec: TargetSpec) -> dict[str, Any]:
    """config.json of a multimodal target without its towers."""
    narrow, wide = spec.intermediate_sizes[0], spec.intermediate_sizes[-1]
    of_target = {
        "final_logit_softcapping": spec.final_logit_softcapping,
        "hidden_size_per_layer_input": spec.per_layer_size,
        "intermediate_size": narrow,
        "num_kv_shared_layers": spec.num_kv_shared_layers,
        "use_double_wide_mlp": wide == 2 * narrow,
        "vocab_size_per_layer_input": spec.vocab_size_per_layer_input,
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "dtype": "bfloat16",
        "eos_token_id": list(spec.eos_token_ids),
        "model_type": "gemma4",
        "text_config": _text_config(spec, spec.max_position_embeddings) | of_target,
        "tie_word_embeddings": True,
        "vision_config": None,
    }


def drafter_config(spec: DrafterSpec, max_position_embeddings: int) -> dict[str, Any]:
    """config.json of a drafter."""
    of_drafter = {
        "final_logit_softcapping": None,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": spec.intermediate_sizes[0],
        "num_kv_shared_layers": spec.num_layers,
        "use_double_wide_mlp": False,
        "vocab_size_per_layer_input": 0,
    }
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": spec.backbone_hidden_size,
        "centroid_intermediate_top_k": spec.head.top_k,
        "dtype": "bfloat16",
        "model_type": "gemma4_assistant",
        "num_centroids": spec.head.num_centroids,
        "text_config": _text_config(spec, max_position_embeddings) | of_drafter,
        "tie_word_embeddings": True,
        "use_ordered_embeddings": True,
    }


def _text_config(spec: DecoderSpec, max_position_embeddings: int) -> dict[str, Any]:
    """What target and drafter say alike."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": False,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "eos_token_id": 1,
        "global_head_dim": spec.global_head_dim,
        "head_dim": spec.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "layer_types": list(spec.layer_types),
        "max_position_embeddings": max_position_embeddings,
        "model_type": "gemma4_text",
        "num_attention_heads": spec.num_heads,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_parameters": {
            FULL: {
                "partial_rotary_factor": spec.full_rope.partial_rotary_factor,
                "rope_theta": spec.full_rope.theta,
                "rope_type": "proportional",
            },
            SLIDING: {"rope_theta": spec.sliding_rope.theta, "rope_type": "default"},
        },
        "sliding_window": spec.sliding_window,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": None,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
