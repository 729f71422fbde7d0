"""Which files of a folder hold the weights, and what else lies there: shards, indices, adapters, damaged downloads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtp_export.arch.published import NANO
from mtp_export.errors import CheckpointError
from mtp_export.source.embedded import EMBEDDED
from mtp_export.source.pair import open_pair
from tests.differential import oracle
from tests.differential.oracle import INDEX, PREFIX, WEIGHTS, Pair, Tensors, nano_pair, rewrite_json, write_tensors
from tests.differential.tensor_layouts import noise, weights_of_nano
from tests.differential.transformation import Record, Suite

SUITE = Suite()
equal, refused = SUITE.equal, SUITE.refused


def shard_name(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


def in_shards(folder: Path, tensors: Tensors, count: int = 3) -> None:
    """Save as transformers does: an index, and tensors in the order of their names."""
    names = sorted(tensors)
    places = {name: shard_name(1 + i * count // len(names), count) for i, name in enumerate(names)}
    for shard in set(places.values()):
        write_tensors({name: tensors[name] for name in names if places[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def sharded(pair: Pair) -> None:
    for folder in (pair.target, pair.drafter):
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        in_shards(folder, tensors)


def other_weights(folder: Path) -> Tensors:
    return {name: noise(tensor) for name, tensor in load_file(folder / WEIGHTS).items() if tensor.is_floating_point()}


@equal()
def saved_in_shards(pair: Pair) -> None:
    sharded(pair)


@equal(loads=False)
def shards_without_an_index(pair: Pair) -> None:
    """transformers asks for the index; their own numbering says as much."""
    sharded(pair)
    for folder in (pair.target, pair.drafter):
        (folder / INDEX).unlink()


@refused("shard 2 of 3 is missing: the target checkpoint is incomplete")
def shards_without_an_index_of_which_one_is_missing(pair: Pair) -> None:
    shards_without_an_index(pair)
    (pair.target / shard_name(2, 3)).unlink()


@refused(
    "holds shards of several checkpoints, and no model.safetensors.index.json: download it again",
    remedy=weights_of_nano,
)
def shards_of_two_savings_without_an_index(pair: Pair) -> None:
    shards_without_an_index(pair)
    (pair.target / shard_name(1, 3)).rename(pair.target / shard_name(1, 4))


@refused("model-00002-of-00003.safetensors is missing: the target checkpoint is incomplete")
def an_index_that_names_a_missing_shard(pair: Pair) -> None:
    sharded(pair)
    (pair.target / shard_name(2, 3)).unlink()


@equal()
def a_whole_file_beside_a_stale_index(pair: Pair) -> None:
    """Left by an earlier saving, whose shards are gone."""
    tensors = load_file(pair.target / WEIGHTS)
    (pair.target / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard_name(1, 1))}))


@equal()
def a_whole_file_beside_the_shards_of_other_weights(pair: Pair) -> None:
    """transformers takes the whole file."""
    in_shards(pair.target, other_weights(pair.target))
    in_shards(pair.drafter, load_file(pair.drafter / WEIGHTS))


@equal()
def shards_beside_a_file_that_the_index_does_not_name(pair: Pair) -> None:
    other = other_weights(pair.target)
    sharded(pair)
    write_tensors(other, pair.target / "consolidated.safetensors")


@equal()
def a_file_that_the_config_names(pair: Pair) -> None:
    write_tensors(other_weights(pair.target), pair.target / "best.safetensors")
    pair.config({"transformers_weights": "best.safetensors"})


@equal()
def an_index_that_the_config_names(pair: Pair) -> None:
    other = other_weights(pair.target)
    in_shards(pair.target, other, count=2)
    (pair.target / INDEX).rename(pair.target / "best.safetensors.index.json")
    pair.config({"transformers_weights": "best.safetensors.index.json"})


@refused("config.json: transformers_weights names the unsafe file '../drafter/model.safetensors'")
def a_file_outside_of_the_folder(pair: Pair) -> None:
    pair.config({"transformers_weights": "../drafter/model.safetensors"})


def saved_as_safetensors(pair: Pair) -> None:
    write_tensors(torch.load(pair.target / "pytorch_model.bin"), pair.target / WEIGHTS)


@refused(
    "has only pickled weights, which can run code when loaded: save it as safetensors", remedy=saved_as_safetensors
)
def saved_as_pickle(pair: Pair) -> None:
    torch.save(load_file(pair.target / WEIGHTS), pair.target / "pytorch_model.bin")
    (pair.target / WEIGHTS).unlink()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 10246621918\n"


@refused(
    "model.safetensors is a git-LFS pointer, not the file itself: run `git lfs pull`, or download it again",
    remedy=weights_of_nano,
)
def cloned_without_lfs(pair: Pair) -> None:
    (pair.target / WEIGHTS).write_text(POINTER)


@refused("model.safetensors is damaged or truncated", remedy=weights_of_nano)
def a_download_that_broke_off(pair: Pair) -> None:
    content = (pair.target / WEIGHTS).read_bytes()
    (pair.target / WEIGHTS).write_bytes(content[: len(content) // 2])


def without_adapter(pair: Pair) -> None:
    for path in pair.target.glob("adapter_*"):
        path.unlink()


@refused("holds an adapter (adapter_config.json), and transformers loads such a folder as", remedy=without_adapter)
def an_adapter_beside_a_model(pair: Pair) -> None:
    rewrite_json(pair.target / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "x/y"})
    write_tensors({"base_model.model.lm_head.lora_A.weight": torch.zeros(1)}, pair.target / "adapter_model.safetensors")


def base_and_adapter(pair: Pair) -> Pair:
    return Pair(target=EMBEDDED / "target", drafter=pair.drafter, adapters=(pair.target,))


@refused("give the base with --checkpoint and this folder with --adapter", remedy=base_and_adapter)
def an_adapter_given_as_a_checkpoint(pair: Pair) -> None:
    """One that has learned nothing yet."""
    for name in ("config.json", WEIGHTS):
        (pair.target / name).unlink()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    rewrite_json(pair.target / "adapter_config.json", config)
    module = f"base_model.model.{PREFIX}layers.0.self_attn.q_proj"
    sides = {f"{module}.lora_A.weight": torch.ones(4, 256), f"{module}.lora_B.weight": torch.zeros(256, 4)}
    write_tensors(sides, pair.target / "adapter_model.safetensors")


@refused("model_type is 'gemma4_assistant', expected 'gemma4' or 'gemma4_text'")
def target_and_drafter_given_for_each_other(pair: Pair) -> Pair:
    return Pair(target=pair.drafter, drafter=pair.target)


def without_byte_order_mark(pair: Pair) -> None:
    path = pair.target / "config.json"
    path.write_text(path.read_text(encoding="utf-8-sig"), encoding="utf-8")


@refused("config.json begins with a byte order mark: save it as UTF-8 without one", remedy=without_byte_order_mark)
def a_config_saved_with_a_byte_order_mark(pair: Pair) -> None:
    """As some editors save it; transformers does not take it."""
    path = pair.target / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


@equal()
def an_index_with_names_that_are_no_tensors(pair: Pair) -> None:
    """Of an index, transformers reads which files there are."""
    sharded(pair)
    rewrite_json(pair.target / INDEX, lambda index: index["weight_map"].update({"stale.weight": shard_name(1, 3)}))


@refused("lies in model-00001-of-00003.safetensors and in", remedy=weights_of_nano)
def a_tensor_in_two_shards(pair: Pair) -> None:
    sharded(pair)
    name = f"{PREFIX}embed_tokens.weight"
    shards = [pair.target / shard_name(number, 3) for number in (1, 2)]
    stored = load_file(shards[1])
    write_tensors(stored | {name: load_file(shards[0])[name]}, shards[1])


def test_a_wrong_model_option_is_refused_with_the_right_model() -> None:
    """The refusal names the right one, which is taken."""
    with nano_pair() as pair:
        source = oracle.export_config(pair, pair.target / "out").source
        with pytest.raises(CheckpointError, match="the target is nano, and --model is e2b: give --model nano"):
            open_pair(dataclasses.replace(source, model="e2b"))
        assert open_pair(source).target_spec == NANO.target


@pytest.mark.parametrize("name", SUITE.cases)
def test_transformation(name: str, record_property: Record) -> None:
    SUITE.run(name, record_property)
