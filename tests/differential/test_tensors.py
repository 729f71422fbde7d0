"""How tools name and store the tensors of a checkpoint: layouts, wrappers, heads, dtypes, buffers, parts of towers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mtp_export.source.embedded import EMBEDDED
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
from tests.differential.transformation import Record, Suite

SUITE = Suite()
equal, refused = SUITE.equal, SUITE.refused

EMBEDDING, HEAD = f"{PREFIX}embed_tokens.weight", "lm_head.weight"
DRAFTER_EMBEDDING = "model.embed_tokens.weight"
HEAD_EQUAL = "lm_head.weight, which equals the embedding"


def renamed(pair: Pair, rename: Callable[[str], str], part: str = "target") -> None:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    pair.tensors(change, part)


def added(pair: Pair, tensors: Tensors, part: str = "target") -> None:
    pair.tensors(lambda stored: stored.update(tensors), part)


def noise(tensor: torch.Tensor) -> torch.Tensor:
    """Other weights of the same kind."""
    generator = torch.Generator().manual_seed(0)
    return (tensor.float() + 0.02 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def saved_by(pair: Pair, model: Callable[[Any], Any]) -> None:
    """Have transformers save the target, or a part of it."""
    library: Any = transformers
    whole = library.AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.bfloat16, local_files_only=True)
    (pair.target / WEIGHTS).unlink()
    model(whole).save_pretrained(pair.target)


def weights_of_nano(pair: Pair) -> None:
    """What it takes to save, merge or download the weights once more."""
    for part in ("target", "drafter"):
        shutil.copy(EMBEDDED / part / WEIGHTS, pair.folder(part) / WEIGHTS)


# Layouts


@equal()
def saved_again_by_transformers(pair: Pair) -> None:
    saved_by(pair, lambda model: model)


@equal()
def saved_as_gemma4_model(pair: Pair) -> None:
    saved_by(pair, lambda model: model.model)
    assert "language_model.norm.weight" in load_file(pair.target / WEIGHTS)


@equal()
def saved_as_text_model(pair: Pair) -> None:
    saved_by(pair, lambda model: model.model.language_model)
    assert "norm.weight" in load_file(pair.target / WEIGHTS)


@equal()
def saved_as_causal_language_model(pair: Pair) -> None:
    def text_alone(model: Any) -> Any:
        library: Any = transformers
        alone = library.Gemma4ForCausalLM(model.config.text_config).to(torch.bfloat16)
        alone.model = model.model.language_model
        alone.lm_head = model.lm_head
        return alone

    saved_by(pair, text_alone)
    assert "model.norm.weight" in load_file(pair.target / WEIGHTS)


@equal()
def drafter_saved_again_by_transformers(pair: Pair) -> None:
    library: Any = transformers
    model = library.AutoModelForCausalLM.from_pretrained(pair.drafter, dtype=torch.bfloat16, local_files_only=True)
    model.save_pretrained(pair.drafter)


@equal(loads=False)
def layout_of_older_transformers(pair: Pair) -> None:
    renamed(pair, lambda name: f"language_model.{name.replace('language_model.', '')}")
    assert "language_model.model.norm.weight" in load_file(pair.target / WEIGHTS)


@equal(loads=False)
def layout_of_a_text_model_under_the_whole_config(pair: Pair) -> None:
    renamed(pair, lambda name: name.replace("language_model.", ""))


@equal("model.layers.0.layer_scalar", loads=True)
def a_stray_tensor_of_another_layout(pair: Pair) -> None:
    added(pair, {"model.layers.0.layer_scalar": torch.zeros(1)})


@refused(
    "are one tensor, stored twice: remove one of them",
    remedy=weights_of_nano,
)
def two_layouts_at_once(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({n.removeprefix("model."): noise(t) for n, t in list(stored.items())}))


@equal()
def one_module_saved_without_its_prefix(pair: Pair) -> None:
    """transformers adds and takes off its own prefix name by name."""
    renamed(pair, lambda name: name.removeprefix("model.") if "embed_tokens." in name else name)


@equal()
def prefix_twice(pair: Pair) -> None:
    renamed(pair, lambda name: f"model.{name}")


@equal()
def drafter_without_the_prefix_of_its_base(pair: Pair) -> None:
    renamed(pair, lambda name: name.removeprefix("model."), "drafter")


@equal()
def drafter_with_the_prefix_everywhere(pair: Pair) -> None:
    renamed(pair, lambda name: name if name.startswith("model.") else f"model.{name}", "drafter")


# Wrappers


@equal("_orig_mod.model.norm.weight", "module.step")
def strays_of_a_wrapper(pair: Pair) -> None:
    added(pair, {"module.step": torch.ones(1), "_orig_mod.model.norm.weight": torch.ones(256)})


@equal(loads=False)
def saved_with_torch_compile(pair: Pair) -> None:
    for part in ("target", "drafter"):
        renamed(pair, lambda name: f"_orig_mod.{name}", part)


@equal(loads=False)
def saved_with_data_parallel(pair: Pair) -> None:
    for part in ("target", "drafter"):
        renamed(pair, lambda name: f"module.{name}", part)


@equal(loads=False)
def saved_with_data_parallel_around_torch_compile(pair: Pair) -> None:
    renamed(pair, lambda name: f"module._orig_mod.{name}")


@equal(loads=False)
def saved_within_peft_after_merging(pair: Pair) -> None:
    renamed(pair, lambda name: f"base_model.model.{name}")


@refused(
    "tensors have '_orig_mod.' in their names, which a wrapper of a training library put there, and model.language",
    remedy=weights_of_nano,
)
def compiled_in_part(pair: Pair) -> None:
    renamed(pair, lambda name: f"_orig_mod.{name}" if ".layers.0." in name else name)


@refused("tensors have '_orig_mod.' in their names", remedy=weights_of_nano)
def layers_compiled_one_by_one(pair: Pair) -> None:
    renamed(pair, lambda name: name.replace(".layers.0.", ".layers.0._orig_mod."))


@refused("tensors have '_fsdp_wrapped_module.' in their names", remedy=weights_of_nano)
def saved_with_fsdp(pair: Pair) -> None:
    renamed(pair, lambda name: name.replace(".layers.1.", ".layers.1._fsdp_wrapped_module."))


@refused("tensors have 'module.' in their names", remedy=weights_of_nano)
def drafter_wrapped_in_part(pair: Pair) -> None:
    renamed(pair, lambda name: f"module.{name}" if "projection" in name else name, "drafter")


def unmerged(pair: Pair) -> None:
    renamed(pair, lambda name: name.replace("0.mlp.up_proj.", "0.mlp.up_proj.base_layer."))


def as_base_layer_is_called(pair: Pair) -> None:
    renamed(pair, lambda name: name.replace("base_layer.", ""))


SUITE.refused(
    "is part of an adapter that is not merged (base_layer): call merge_and_unload() before saving",
    remedy=as_base_layer_is_called,
)(unmerged)


@refused("is part of an adapter that is not merged (lora_A)", remedy=weights_of_nano)
def adapter_saved_beside_the_weights(pair: Pair) -> None:
    added(pair, {"model.language_model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 256)})


# Heads


@equal(HEAD_EQUAL)
def tied_head_stored_too(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored[EMBEDDING]}))


@equal(HEAD_EQUAL)
def tied_head_stored_in_another_dtype(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored[EMBEDDING].float()}))


@equal()
def head_trained_apart_under_a_config_that_says_tied(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: noise(stored[EMBEDDING])}))


@equal()
def head_trained_apart_under_a_config_that_says_so(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: noise(stored[EMBEDDING])}))
    pair.config({"tie_word_embeddings": False})


@equal()
def head_equal_under_a_config_that_says_untied(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored[EMBEDDING]}))
    pair.config({"tie_word_embeddings": False})
    pair.text_config(tie_word_embeddings=False)


@equal()
def head_within_the_base_model_prefix(pair: Pair) -> None:
    """transformers takes its own prefix off."""
    pair.tensors(lambda stored: stored.update({f"model.{HEAD}": noise(stored[EMBEDDING])}))


@equal()
def head_alone_stored(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored.pop(EMBEDDING)}))


@equal()
def untied_in_the_text_config_alone(pair: Pair) -> None:
    """Of the whole model, the outer config counts."""
    pair.text_config(tie_word_embeddings=False)


@equal()
def tied_in_the_text_config_alone(pair: Pair) -> None:
    pair.config({"tie_word_embeddings": ...})


@equal("language_model.lm_head.weight")
def head_under_a_name_that_transformers_does_not_know(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({f"language_model.{HEAD}": noise(stored[EMBEDDING])}))


@equal(loads=False)
def untied_head_in_the_layout_of_older_transformers(pair: Pair) -> None:
    """The head beside the model belongs to it there; this one equals the embedding."""
    layout_of_older_transformers(pair)
    name = "language_model.model.embed_tokens.weight"
    pair.tensors(lambda stored: stored.update({f"language_model.{HEAD}": stored[name]}))
    pair.config({"tie_word_embeddings": False})


@refused(
    "config.json says tie_word_embeddings = false, and tensor lm_head.weight is missing: the checkpoint is incomplete, "
    "or set tie_word_embeddings to true if its head is its embedding",
    remedy=lambda pair: pair.config({"tie_word_embeddings": True}),
)
def untied_without_a_head(pair: Pair) -> None:
    pair.config({"tie_word_embeddings": False})


@refused("tensor model.language_model.embed_tokens.weight is missing: the checkpoint is incomplete")
def neither_head_nor_embedding(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.pop(EMBEDDING))


@refused("tensor lm_head.weight has shape [4000, 256], config.json asks for [4096, 256]")
def head_cut_short(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored[EMBEDDING][:4000]}))


@equal("of the drafter: lm_head.weight, which equals the embedding")
def drafter_with_its_tied_head(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored[DRAFTER_EMBEDDING]}), "drafter")


@equal()
def drafter_with_a_head_trained_apart(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: noise(stored[DRAFTER_EMBEDDING])}), "drafter")


@equal()
def drafter_with_its_head_alone(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored.pop(DRAFTER_EMBEDDING)}), "drafter")


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
