"""Layouts of tensors, and names that wrappers leave in them; and the changes that all transformations are made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from mtp_export.source.embedded import EMBEDDED
from tests.differential.oracle import PREFIX, WEIGHTS, Pair, Tensors
from tests.differential.transformation import Suite

SUITE = Suite()
equal, refused = SUITE.equal, SUITE.refused

EMBEDDING, HEAD = f"{PREFIX}embed_tokens.weight", "lm_head.weight"
DRAFTER_EMBEDDING = "model.embed_tokens.weight"


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
