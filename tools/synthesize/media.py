"""What the texts of a checkpoint say of images and audio: the parts of config.json for the towers, the tokens that
stand for media, and how a processor prepares them.

The values of config.json are those of the published E2B and E4B, which agree. No published processor_config.json was at
hand: its values are the defaults of transformers' Gemma4Processor, which was written for these models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.synthesize.towers import AudioTower, Towers, VisionTower

# What the library saves of every model beside its settings.
BOOKKEEPING: Mapping[str, Any] = {
    "_name_or_path": "",
    "architectures": None,
    "chunk_size_feed_forward": 0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
}
_TOKENS: Mapping[str, tuple[str, int]] = {
    "boi": ("<|image>", 255999),
    "boa": ("<|audio>", 256000),
    "image": ("<|image|>", 258880),
    "audio": ("<|audio|>", 258881),
    "eoi": ("<image|>", 258882),
    "eoa": ("<audio|>", 258883),
    "video": ("<|video|>", 258884),
}
_SOFT_TOKENS, _VIDEO_SOFT_TOKENS, _VIDEO_FRAMES = 280, 70, 32
_PATCHES: Mapping[str, Any] = {
    "do_convert_rgb": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def token_ids(vocab_size: int) -> dict[str, int]:
    """The ids of the media tokens by their short names: the published ones; in a smaller vocabulary its last seven,
    where nano has them."""
    published = {name: token_id for name, (_, token_id) in _TOKENS.items()}
    if max(published.values()) < vocab_size:
        return published
    return {name: vocab_size - len(_TOKENS) + i for i, name in enumerate(_TOKENS)}


def with_moved_media_tokens(tokenizer: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """nano's tokenizer.json, filled up to `vocab_size`, with the media tokens under the ids of that size; the tokens
    that had those ids take nano's."""
    before: dict[str, int] = tokenizer["model"]["vocab"]
    moved = {_TOKENS[name][0]: token_id for name, token_id in token_ids(vocab_size).items()}
    taken = set(moved.values())
    left = iter(sorted({before[token] for token in moved} - taken))
    kept = {t: i if i not in taken else next(left) for t, i in before.items() if t not in moved}
    vocabulary = kept | moved
    added = [token | {"id": moved.get(token["content"], token["id"])} for token in tokenizer["added_tokens"]]
    return tokenizer | {
        "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        "model": tokenizer["model"] | {"vocab": vocabulary},
    }


def target_settings(towers: Towers, vocab_size: int) -> dict[str, Any]:
    """Return the outer keys of a target's config.json that it has because of the towers."""
    ids = token_ids(vocab_size)
    return {
        "audio_config": _audio_config(towers.audio),
        "eoa_token_index": ids["eoa"],
        "initializer_range": 0.02,
        "transformers_version": "5.5.0.dev0",
        "vision_config": _vision_config(towers.vision),
        "vision_soft_tokens_per_image": _SOFT_TOKENS,
    } | {f"{name}_token_id": token_id for name, token_id in ids.items()}


def drafter_settings(vocab_size: int) -> dict[str, Any]:
    """Return the outer keys of a drafter's config.json that the published ones have in addition."""
    ids = token_ids(vocab_size)
    return {"transformers_version": "5.7.0.dev0"} | {
        f"{name}_token_id": token_id for name, token_id in ids.items() if name != "video"
    }


def processor_config() -> dict[str, Any]:
    """processor_config.json."""
    return {
        "audio_ms_per_token": 40,
        "audio_seq_length": 750,
        "feature_extractor": _FEATURES,
        "image_processor": {
            **_PATCHES,
            "image_processor_type": "Gemma4ImageProcessor",
            "do_normalize": False,
            "max_soft_tokens": _SOFT_TOKENS,
        },
        "image_seq_length": _SOFT_TOKENS,
        "processor_class": "Gemma4Processor",
        "video_processor": {
            **_PATCHES,
            "do_normalize": True,
            "do_sample_frames": True,
            "max_soft_tokens": _VIDEO_SOFT_TOKENS,
            "num_frames": _VIDEO_FRAMES,
            "video_processor_type": "Gemma4VideoProcessor",
        },
    }


_FEATURES: Mapping[str, Any] = {
    "dither": 0.0,
    "feature_extractor_type": "Gemma4AudioFeatureExtractor",
    "feature_size": 128,
    "fft_length": 512,
    "fft_overdrive": False,
    "frame_length": 320,
    "hop_length": 160,
    "input_scale_factor": 1.0,
    "max_frequency": 8000.0,
    "mel_floor": 0.001,
    "min_frequency": 0.0,
    "padding_side": "right",
    "padding_value": 0.0,
    "per_bin_mean": None,
    "per_bin_stddev": None,
    "preemphasis": 0.0,
    "preemphasis_htk_flavor": True,
    "return_attention_mask": True,
    "sampling_rate": 16000,
}


def _vision_config(tower: VisionTower) -> dict[str, Any]:
    return {
        **BOOKKEEPING,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "default_output_length": _SOFT_TOKENS,
        "dtype": "bfloat16",
        "global_head_dim": tower.head_dim,
        "head_dim": tower.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": tower.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": tower.intermediate_size,
        "max_position_embeddings": 131072,
        "model_type": "gemma4_vision",
        "num_attention_heads": tower.num_heads,
        "num_hidden_layers": tower.num_layers,
        "num_key_value_heads": tower.num_heads,
        "patch_size": tower.patch_size,
        "pooling_kernel_size": 3,
        "position_embedding_size": tower.num_positions,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "standardize": False,
        "use_clipped_linears": True,
    }


def _audio_config(tower: AudioTower) -> dict[str, Any]:
    return {
        **BOOKKEEPING,
        "attention_chunk_size": 12,
        "attention_context_left": 13,
        "attention_context_right": 0,
        "attention_invalid_logits_value": -1e9,
        "attention_logit_cap": 50.0,
        "conv_kernel_size": tower.conv_kernel_size,
        "dtype": "bfloat16",
        "gradient_clipping": 1e10,
        "hidden_act": "silu",
        "hidden_size": tower.hidden_size,
        "initializer_range": 0.02,
        "model_type": "gemma4_audio",
        "num_attention_heads": tower.num_heads,
        "num_hidden_layers": tower.num_layers,
        "output_proj_dims": tower.output_size,
        "residual_weight": 0.5,
        "rms_norm_eps": 1e-06,
        "subsampling_conv_channels": list(tower.conv_channels),
        "use_clipped_linears": True,
    }
