"""How tools name and store the tensors of a checkpoint: layouts, wrappers, heads, dtypes, buffers, parts of towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.differential.oracle import (
    PREFIX,
    WEIGHTS,
    Pair,
    Tensors,
    assert_transformers_agrees,
    exported,
    nano_pair,
    planned,
)
from tests.differential.tensor_heads import HEAD_EQUAL
from tests.differential.tensor_layouts import (
    HEAD,
    SUITE,
    added,
    noise,
    saved_by,
    weights_of_nano,
)
from tests.differential.transformation import Record

__all__ = ["SUITE"]
equal, refused = SUITE.equal, SUITE.refused


# Dtypes


def cast(pair: Pair, dtype: torch.dtype, part: str = "target", pattern: str = "") -> None:
    def change(stored: Tensors) -> None:
        for name, tensor in stored.items():
            if tensor.is_floating_point() and pattern in name:
                stored[name] = tensor.to(dtype)

    pair.tensors(change, part)


@equal()
def stored_in_float16(pair: Pair) -> None:
    for part in ("target", "drafter"):
        cast(pair, torch.float16, part)


@equal()
def stored_in_float32(pair: Pair) -> None:
    for part in ("target", "drafter"):
        cast(pair, torch.float32, part)


@equal()
def stored_in_float64(pair: Pair) -> None:
    cast(pair, torch.float64)


@equal()
def norms_in_float32_beside_bfloat16(pair: Pair) -> None:
    cast(pair, torch.float32, pattern="norm")


@equal()
def projections_in_float16_beside_bfloat16(pair: Pair) -> None:
    cast(pair, torch.float16, pattern="proj")


@equal()
def token_ordering_in_int32(pair: Pair) -> None:
    name = "masked_embedding.token_ordering"
    pair.tensors(lambda stored: stored.update({name: stored[name].int()}), "drafter")


@refused("has dtype F8_E4M3, expected BF16 or F16 or F32 or F64")
def stored_in_float8(pair: Pair) -> None:
    cast(pair, torch.float8_e4m3fn, pattern="mlp.up_proj")


@refused("holds NaN or infinity: the weights are damaged")
def overflowed_in_float16(pair: Pair) -> None:
    name = f"{PREFIX}layers.3.mlp.up_proj.weight"
    pair.tensors(lambda stored: stored.update({name: torch.full_like(stored[name], torch.inf)}))


@refused(
    "quantization_config has quant_method = 'bitsandbytes', expected 'compressed-tensors': take the published "
    "checkpoint whose name ends in -ct, or one in floats",
    remedy=weights_of_nano,
)
def quantised_by_bitsandbytes(pair: Pair) -> None:
    name = f"{PREFIX}layers.0.mlp.up_proj.weight"
    pair.tensors(lambda stored: stored.update({name: torch.zeros(512 * 256 // 2, 1, dtype=torch.uint8)}))
    pair.config({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})


# Buffers, and tensors that do nothing


@equal("buffers that follow from config.json (2 tensors)")
def buffers_of_rotary_embeddings(pair: Pair) -> None:
    names = (f"{PREFIX}rotary_emb.{kind}_attention_inv_freq" for kind in ("full", "sliding"))
    pair.tensors(lambda stored: stored.update({name: torch.ones(64) for name in names}))


@equal("buffers that follow from config.json (10 tensors)")
def buffers_of_rotary_embeddings_by_layer(pair: Pair) -> None:
    names = (f"{PREFIX}layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(10))
    pair.tensors(lambda stored: stored.update({name: torch.ones(32) for name in names}))


@equal(
    "buffers that follow from config.json (2 tensors)",
    "of the drafter: buffers that follow from config.json (1 tensor)",
)
def buffer_of_the_embedding_scale(pair: Pair) -> None:
    added(pair, {f"{PREFIX}embed_tokens.embed_scale": torch.tensor(3.0)})
    added(pair, {f"{PREFIX}embed_tokens_per_layer.embed_scale": torch.tensor(3.0)})
    added(pair, {"model.embed_tokens.embed_scale": torch.tensor(3.0)}, "drafter")


@refused("layers.0.layer_scalar is missing: the checkpoint is incomplete")
def buffers_left_out_by_zero3(pair: Pair) -> None:
    pair.tensors(lambda stored: [stored.pop(name) for name in list(stored) if name.endswith("layer_scalar")])


@refused("layer_scalar has shape [], config.json asks for [1]")
def scalars_without_an_axis(pair: Pair) -> None:
    pair.tensors(
        lambda stored: stored.update({n: t.reshape(()) for n, t in stored.items() if n.endswith("layer_scalar")})
    )


@equal("keys and values of KV-sharing layers (15 tensors)")
def keys_and_values_that_nothing_reads(pair: Pair) -> None:
    """As the published files without quantisation-aware training have them."""

    def change(stored: Tensors) -> None:
        for layer in range(5, 10):
            for name in ("k_proj", "v_proj", "k_norm"):
                own = stored[f"{PREFIX}layers.{4 if layer == 9 else 0}.self_attn.{name}.weight"]
                stored[f"{PREFIX}layers.{layer}.self_attn.{name}.weight"] = noise(own)

    pair.tensors(change)


@equal("scales of a quantised KV cache (2 tensors)", "scales of activations (1 tensor)")
def scales_of_a_quantised_cache(pair: Pair) -> None:
    for name in ("layers.0.self_attn.k_scale", "layers.0.self_attn.v_scale", "layers.0.mlp.up_proj.input_scale"):
        added(pair, {PREFIX + name: torch.tensor(0.5)})


@equal("model.language_model.layers.0.self_attn.q_proj.bias")
def a_bias_that_the_config_does_not_ask_for(pair: Pair) -> None:
    added(pair, {f"{PREFIX}layers.0.self_attn.q_proj.bias": torch.ones(256)})


@equal("optimizer.step", "ema.0", "ema.1", "3 more tensors")
def tensors_of_a_training_run(pair: Pair) -> None:
    for name in ("ema.0", "ema.1", "optimizer.step", "value_head.0", "value_head.1", "value_head.2"):
        added(pair, {name: torch.ones(4)})


# Towers


def with_towers(pair: Pair) -> None:
    """Small towers, as transformers saves them."""
    library: Any = transformers
    config = library.AutoConfig.from_pretrained(pair.target)
    audio = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    whole = library.Gemma4Config(
        text_config=config.text_config.to_dict(),
        audio_config=library.Gemma4AudioConfig(**audio).to_dict(),
        vision_config=library.Gemma4VisionConfig(**vision, num_key_value_heads=2, head_dim=32).to_dict(),
        eos_token_id=config.eos_token_id,
        **dict.fromkeys(("image_token_id", "audio_token_id", "video_token_id"), 3),
    )
    torch.manual_seed(0)
    model = library.Gemma4ForConditionalGeneration(whole).to(torch.bfloat16)
    model.load_state_dict(load_file(pair.target / WEIGHTS), strict=False)
    model.tie_weights()
    (pair.target / WEIGHTS).unlink()
    model.save_pretrained(pair.target)


@equal("vision tower (28 tensors)", "audio tower (69 tensors)", "projections of images and audio (2 tensors)")
def with_both_towers(pair: Pair) -> None:
    with_towers(pair)


@equal(loads=False)
def merged_without_the_towers_that_the_config_has(pair: Pair) -> None:
    """transformers makes up the towers' weights; text is what it was."""
    with_towers(pair)
    pair.tensors(lambda stored: [stored.pop(name) for name in list(stored) if "language_model" not in name])


@equal("vision tower (1 tensor)", "audio tower (1 tensor)", "projections of images and audio (1 tensor)")
def towers_that_the_config_does_not_have(pair: Pair) -> None:
    for name in ("vision_tower.x.weight", "embed_audio.embedding_projection.weight", "audio_tower.x.weight"):
        added(pair, {f"model.{name}": torch.zeros(2, 2)})


# Vocabularies


def resized(pair: Pair, tokens: int) -> None:
    def change(model: Any) -> Any:
        model.resize_token_embeddings(tokens)
        return model

    saved_by(pair, change)


def resized_back(pair: Pair) -> None:
    resized(pair, 4096)


@refused(
    "the target's vocabulary has 4160 tokens and that of nano 4096: one of the pair was resized: call "
    "resize_token_embeddings(4096) and save it again",
    remedy=resized_back,
)
def vocabulary_made_larger(pair: Pair) -> None:
    resized(pair, 4160)


@pytest.mark.parametrize(
    "name",
    [
        "head_trained_apart_under_a_config_that_says_tied",
        "head_alone_stored",
        "drafter_with_a_head_trained_apart",
    ],
)
def test_in_onnx_too(name: str) -> None:
    """Where head and embedding are is all that differs by format."""
    with nano_pair() as pair:
        SUITE.cases[name].change(pair)
        run, _ = exported(pair, "onnx")
        assert_transformers_agrees(run, pair)


@pytest.mark.parametrize("name", ["tied_head_stored_too", "with_both_towers", "saved_again_by_transformers"])
def test_a_plan_lists_the_same(name: str) -> None:
    """But that head and embedding are equal, which takes reading them."""
    with nano_pair() as pair:
        SUITE.cases[name].change(pair)
        expected = [
            words.replace(HEAD_EQUAL, f"{HEAD}, if it equals the embedding") for words in SUITE.cases[name].words
        ]
        assert list(planned(pair).left_aside) == expected


@pytest.mark.parametrize("name", SUITE.cases)
def test_transformation(name: str, record_property: Record) -> None:
    SUITE.run(name, record_property)
