"""The files beside the weights: config.json as it is published, and a tokenizer that has every id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_export.arch.spec import FULL, SLIDING, DecoderSpec, DrafterSpec, TargetSpec
from mtp_export.source.embedded import EMBEDDED
from tools.synthesize import media, quantised
from tools.synthesize.towers import Towers

_STOP_BESIDE_EOS = 50  # generation_config.json of the published targets stops here too
# As published. Without towers a pair is greedy: it is there to be measured.
_SAMPLER: Mapping[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
_GREEDY: Mapping[str, Any] = {"do_sample": False}


def write_target_texts(
    folder: Path, spec: TargetSpec, variant: str, towers: Towers | None, leftovers: Mapping[str, Any]
) -> None:
    """Write everything but the weights of a target.

    Args:
        leftovers: further outer keys of config.json.
    """
    config = {**target_config(spec, towers), **leftovers}
    if variant in quantised.VARIANTS:
        config["quantization_config"] = quantised.quantization_config(variant, spec.per_layer_size)
    generation: dict[str, Any] = {
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": [*spec.eos_token_ids, _STOP_BESIDE_EOS],
        "pad_token_id": spec.pad_token_id,
    }
    tokenizer, settings = tokenizer_json(spec.vocab_size), _embedded("tokenizer_config.json")
    if towers is not None:
        settings["processor_class"] = "Gemma4Processor"
        write_json(folder / "processor_config.json", media.processor_config())
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {**generation, **(_GREEDY if towers is None else _SAMPLER)})
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    template = "chat_template.jinja"
    (folder / template).write_bytes((EMBEDDED / "target" / template).read_bytes())


def tokenizer_json(vocab_size: int) -> dict[str, Any]:
    """nano's tokenizer.json, whose special tokens have the published ids; the ids above its own get a name, so that
    whatever a model says can be shown."""
    document = _embedded("tokenizer.json")
    vocabulary = document["model"]["vocab"]
    vocabulary |= {f"<unused{i}>": i for i in range(len(vocabulary), vocab_size)}
    return media.with_moved_media_tokens(document, vocab_size)


def _embedded(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((EMBEDDED / "target" / name).read_text(encoding="utf-8"))
    return document


def target_config(spec: TargetSpec, towers: Towers | None = None) -> dict[str, Any]:
    """config.json of a multimodal target; without towers, only what their absence leaves."""
    narrow, wide = spec.layers[0].intermediate_size, spec.layers[-1].intermediate_size
    of_target = {
        "final_logit_softcapping": spec.final_logit_softcapping,
        "hidden_size_per_layer_input": spec.per_layer_size,
        "intermediate_size": narrow,
        "num_kv_shared_layers": spec.num_layers - spec.num_caches,
        "use_double_wide_mlp": wide == 2 * narrow,
        "vocab_size_per_layer_input": spec.vocab_size_per_layer_input,
    }
    config: dict[str, Any] = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "dtype": "bfloat16",
        "eos_token_id": list(spec.eos_token_ids),
        "model_type": "gemma4",
        "text_config": _text_config(spec, spec.max_position_embeddings) | of_target,
        "tie_word_embeddings": True,
        "vision_config": None,
    }
    if towers is not None:
        config |= media.target_settings(towers, spec.vocab_size)
        config["text_config"] |= dict.fromkeys(("expert_intermediate_size", "moe_intermediate_size"))
    return config


def drafter_config(spec: DrafterSpec, max_position_embeddings: int) -> dict[str, Any]:
    """config.json of a drafter."""
    of_drafter = {
        "final_logit_softcapping": None,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": spec.layers[0].intermediate_size,
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


def published_drafter_config(spec: DrafterSpec, max_position_embeddings: int, *, qat: bool) -> dict[str, Any]:
    """config.json of a drafter with all that the published ones say beside what it needs: the ids of media tokens and
    the library's bookkeeping; with `qat`, the stop ids too."""
    config = drafter_config(spec, max_position_embeddings) | media.drafter_settings(spec.vocab_size)
    config["text_config"] |= {**media.BOOKKEEPING, "moe_intermediate_size": None}
    if qat:
        config["eos_token_id"] = [1, 106]
    return config


def _text_config(spec: DecoderSpec, max_position_embeddings: int) -> dict[str, Any]:
    """Return the keys that target and drafter have in common."""
    sliding, full = spec.kinds[SLIDING], spec.kinds[FULL]
    return {
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": False,
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "global_head_dim": full.head_dim,
        "head_dim": sliding.head_dim,
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
        "num_key_value_heads": full.num_kv_heads,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_parameters": {
            FULL: {
                "partial_rotary_factor": full.rope.partial_rotary_factor,
                "rope_theta": full.rope.theta,
                "rope_type": "proportional",
            },
            SLIDING: {"rope_theta": sliding.rope.theta, "rope_type": "default"},
        },
        "sliding_window": sliding.window,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": None,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
