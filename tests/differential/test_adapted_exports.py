"""Exports with adapters, from end to end: equal to transformers with PEFT's merging."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.differential.adapters import WEIGHTS as ADAPTER_WEIGHTS
from tests.differential.adapters import changed_config, train
from tests.differential.oracle import PREFIX, Pair, Tensors, write_tensors
from tests.differential.transformation import Record, Suite

SUITE = Suite()
equal = SUITE.equal
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # of PEFT
SIDES = {"A": (4, 96), "B": (96, 4)}
TOWERS = (
    "vision_tower.encoder.layers.0.self_attn.q_proj.linear",
    "embed_vision.embedding_projection",
    "audio_tower.layers.0.self_attn.q_proj.linear",
)


def trained(pair: Pair, **options: Any) -> Pair:
    """The pair with an adapter more."""
    folder = pair.target.parent / f"adapter-{len(pair.adapters)}"
    return dataclasses.replace(pair, adapters=(*pair.adapters, train(folder, pair.target, r=4, **options)))


def with_tensors(pair: Pair, tensors: Tensors) -> Pair:
    path = pair.adapters[-1] / ADAPTER_WEIGHTS
    write_tensors(load_file(path) | tensors, path)
    return pair


@equal("2 adapter pairs of the vision tower", "1 adapter pairs of the audio tower", "adapter_config.json: `unsloth`")
def a_lora_of_unsloth_with_its_towers(pair: Pair) -> Pair:
    pair = trained(pair, target_modules=r"(?:.*?(?:vision|image|language|text).*?(?:q_proj|down_proj).*?)")
    changed_config(unsloth={"fixed": True})(pair.adapters[0])
    generator = torch.Generator().manual_seed(0)
    pairs = {
        f"base_model.model.model.{module}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for module in TOWERS
        for side, shape in SIDES.items()
    }
    return with_tensors(pair, pairs)


def _with_pairs_of_sharing_layers(pair: Pair) -> Pair:
    """Trained where layers had keys and values that they do not use."""
    pair = trained(pair, target_modules=["q_proj", "k_proj", "v_proj"])
    stored = load_file(pair.adapters[0] / ADAPTER_WEIGHTS)
    ours = {name: tensor for name, tensor in stored.items() if ".layers.2." in name and ".q_proj." not in name}
    return with_tensors(pair, {name.replace(".2.", ".7."): tensor for name, tensor in ours.items()})


@equal("adapter pairs of keys and values that KV-sharing layers do not have (2)")
def a_lora_of_keys_that_sharing_layers_do_not_have(pair: Pair) -> Pair:
    return _with_pairs_of_sharing_layers(pair)


@equal("adapter pairs of keys and values that KV-sharing layers do not have (2)")
def a_lora_of_keys_that_the_file_has_and_no_layer_uses(pair: Pair) -> Pair:
    pair = _with_pairs_of_sharing_layers(pair)

    def store_unused(tensors: Tensors) -> None:
        for part in ("k_proj", "v_proj"):
            name = f"{PREFIX}layers.2.self_attn.{part}.weight"
            tensors[name.replace(".2.", ".7.")] = tensors[name].clone()

    pair.tensors(store_unused)
    return pair


@equal()
def a_lora_of_the_head(pair: Pair) -> Pair:
    """It changes the tied embedding too, as in PEFT."""
    return trained(pair, target_modules=["lm_head"])


@equal()
def a_saved_head(pair: Pair) -> Pair:
    """It unties the head."""
    return trained(pair, target_modules=["q_proj"], modules_to_save=["lm_head"])


@equal()
def dora_of_everything_and_another_with_trained_rows(pair: Pair) -> Pair:
    tables = ["embed_tokens", "embed_tokens_per_layer"]
    pair = trained(pair, target_modules=["q_proj", "down_proj", *tables], use_dora=True, modules_to_save=["norm"])
    return trained(pair, target_modules=["o_proj"], trainable_token_indices=[2, 300, 301])


@pytest.mark.parametrize("name", SUITE.cases)
def test_transformation(name: str, record_property: Record) -> None:
    SUITE.run(name, record_property)
