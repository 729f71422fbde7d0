"""LoRA adapters: merged rows against torch, and what is refused. The files have PEFT's names; PEFT is not needed."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mtp_export.cli.export import command, config_of
from mtp_export.errors import CheckpointError
from mtp_export.source.adapters import AdaptedCheckpoint, merge
from mtp_export.source.adapters.fields import HARMLESS, PLAIN, READ
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.pair import input_files, open_pair
from tests.support.tiny_files import MODELS, pair_arguments, rewrite_json, rewrite_tensors, tiny_model

ADAPTED = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
PREFIX = "base_model.model.model.language_model."
RANK, ALPHA = 4, 6


def save_adapter(folder: Path, target: Path, prefix: str = PREFIX, seed: int = 0, **config: Any) -> Path:
    """Write an adapter of two modules of the checkpoint `target`."""
    checkpoint, generator = Checkpoint(target, "target"), torch.Generator().manual_seed(seed)
    tensors = {}
    for module in ADAPTED:
        rows, columns = checkpoint.tensors[f"{module}.weight"].shape
        tensors[f"{prefix}{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"{prefix}{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config), encoding="utf-8")
    return folder


def merged_by_torch(target: Path, adapter: Path, module: str, scale: float) -> torch.Tensor:
    checkpoint, tensors = Checkpoint(target, "target"), load_file(adapter / "adapter_model.safetensors")
    (a,) = (value for name, value in tensors.items() if name.endswith(f".{module}.lora_A.weight"))
    (b,) = (value for name, value in tensors.items() if name.endswith(f".{module}.lora_B.weight"))
    name = f"{module}.weight"
    merged: torch.Tensor = torch.from_numpy(checkpoint.rows(name, 0, checkpoint.tensors[name].shape[0])) + scale * b @ a
    return merged


@pytest.fixture
def target(tiny: Path) -> Path:
    return tiny / "target"


@pytest.mark.parametrize("prefix", [PREFIX, "base_model.model.model."])
@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (ALPHA / RANK, ALPHA / RANK)),
        ({"use_rslora": True}, (ALPHA / 2, ALPHA / 2)),
        ({"alpha_pattern": {"q_proj": 12}}, (12 / RANK, ALPHA / RANK)),
        ({"r": 2, "rank_pattern": {"layers.0.self_attn.q_proj": RANK, "down_proj": RANK}}, (1.5, 1.5)),
    ],
)
def test_rows_are_those_that_torch_merges(
    target: Path, tmp_path: Path, prefix: str, config: dict[str, Any], scales: tuple[float, float]
) -> None:
    adapter = save_adapter(tmp_path / "adapter", target, prefix, **config)
    adapted = AdaptedCheckpoint(target, "target", [adapter])
    for module, scale in zip(ADAPTED, scales, strict=True):
        expected, name = merged_by_torch(target, adapter, module, scale).numpy(), f"{module}.weight"
        pieces = [adapted.rows(name, 0, 5), adapted.rows(name, 5, len(expected))]
        np.testing.assert_allclose(np.concatenate(pieces), expected, atol=1e-6, rtol=1e-6)
        assert np.abs(expected - Checkpoint(target, "target").rows(name, 0, len(expected))).max() > 0.1


def test_other_tensors_stay_and_several_adapters_add_up(target: Path, tmp_path: Path) -> None:
    adapters = [save_adapter(tmp_path / str(seed), target, seed=seed) for seed in (0, 1)]
    plain, adapted = Checkpoint(target, "target"), AdaptedCheckpoint(target, "target", adapters)
    embedding = "embed_tokens.weight"
    np.testing.assert_array_equal(adapted.rows(embedding, 0, 9), plain.rows(embedding, 0, 9))
    name = f"{ADAPTED[0]}.weight"
    alone = [AdaptedCheckpoint(target, "target", [adapter]).rows(name, 0, 9) for adapter in adapters]
    expected = alone[0] + alone[1] - plain.rows(name, 0, 9)
    np.testing.assert_allclose(adapted.rows(name, 0, 9), expected, atol=1e-5)


MERGE = "merge it with PEFT (merge_and_unload, save_pretrained) and give the result with --checkpoint"
CONVERT = "save it with path_initial_model_for_weight_conversion"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, f"peft_type is 'IA3', expected 'LORA': {MERGE}"),
        ({"peft_type": "LOHA"}, f"peft_type is 'LOHA', expected 'LORA': {MERGE}"),
        (
            {"peft_type": "PREFIX_TUNING"},
            "peft_type is 'PREFIX_TUNING', expected 'LORA': no merged weights do what",
        ),
        ({"peft_type": "a\nb\x1b"}, "peft_type is 'a\\nb\\x1b', expected 'LORA'"),
        ({"peft_type": {"a": [1]}}, "peft_type is {'a': [1]}, expected 'LORA'"),
        ({"peft_type": ...}, "has no peft_type: it is not PEFT's"),
        ({"bias": "some"}, "bias is 'some', expected one of none, all, lora_only"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            f"init_lora_weights is 'pissa_niter_4', which changed the model's {CONVERT}",
        ),
        ({"init_lora_weights": "olora"}, f"is 'olora', which changed {CONVERT}"),
        ({"init_lora_weights": "corda"}, f"is 'corda', which changed {CONVERT}"),
        ({"init_lora_weights": "lora_ga"}, f"is 'lora_ga', which changed {CONVERT}"),
        (
            {"init_lora_weights": "loftq"},
            "is 'loftq', which changed the model's own weights too: train it from another",
        ),
        ({"init_lora_weights": "clover"}, "is 'clover', which is not known to leave the model's own weights alone"),
        ({"init_lora_weights": 1}, "is '1', which is not known to leave the model's own weights alone"),
        ({"r": 8}, "has lora_A [4, "),
        ({"r": 8}, "adapter_config.json has the rank 8"),
        ({"r": 0}, "r is 0, expected a positive whole number"),
        ({"r": True}, "r is True, expected a positive whole number"),
        ({"r": 10**40}, "expected a positive whole number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a number"),
        ({"lora_alpha": 10**400}, "expected a number"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected true or false"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern is '4', expected a positive whole number"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1], expected names with numbers"),
        ({"alpha_pattern": {"(q": 4}}, "alpha_pattern has '(.*\\\\.)?((q)$', which is no regular expression"),
        ({"target_modules": "(q_proj"}, "target_modules has '(q_proj', which is no regular expression"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is {'q_proj': 1}, expected a list of names"),
        ({"target_modules": [1]}, "target_modules is [1], expected a list of names"),
        ({"target_modules": "x" * 300_000}, "target_modules has regular expressions that are too large"),
        ({"target_modules": "((a{999}){999}){999}"}, "target_modules has regular expressions that are too large"),
        ({"target_modules": "(" * 9999 + ")" * 9999}, "which is no regular expression"),
        ({"exclude_modules": "(?R)"}, "exclude_modules has '(?R)', which is no regular expression"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": 1},
            "beside which PEFT takes neither layers_to_transform",
        ),
        ({"layers_pattern": ["h"]}, "layers_pattern is there without layers_to_transform"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform is ['1'], expected numbers of layers"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list of names"),
        (
            {"modules_to_save": ["lm_head"]},
            "has no lm_head.weight, which modules_to_save names: the adapter is incomplete",
        ),
        ({"modules_to_save": ["mlp", "up_proj"]}, "modules_to_save names model.language_model.layers.0.mlp and "),
        (
            {"modules_to_save": ["lm_head"], "ensure_weight_tying": True, "target_modules": ["lm_head"]},
            "target_modules and modules_to_save both change lm_head, which PEFT does not merge: train one",
        ),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices is not a list of tokens, each once"),
        ({"trainable_token_indices": ["a"]}, "trainable_token_indices is not a list of tokens, each once"),
        ({"trainable_token_indices": [1]}, "has no trained rows of embed_tokens: the adapter is incomplete"),
        ({"trainable_token_indices": {"o_proj": [1]}}, "names 'o_proj', which is no embedding of the text model"),
        (
            {"init_lora_weights": False, "target_modules": ["o_proj", "q_proj"]},
            "starts at random: the adapter is incomp",
        ),
        (
            {"target_modules": ["wq"]},
            "adapter pairs of modules that adapter_config.json does not name (2)): leave it out",
        ),
        ({"use_dora": True}, "has no lora_magnitude_vector: the adapter is incomplete"),
        ({"use_dora": True, "velora_config": {}}, "has use_dora and velora_config, of which PEFT takes one"),
        ({"lora_bias": True}, "lora_bias is True: the layers of the text model have no bias"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is [1]: it acts only after these tokens"),
        ({"use_qalora": True}, "use_qalora is True: it was trained on a GPTQ checkpoint"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]: it repeats layers"),
        ({"arrow_config": {}}, "arrow_config is {}: it chooses among adapters"),
        ({"kasa_config": {}}, "kasa_config is {}: it changed the model's own weights too"),
        ({"megatron_config": {"a": 1}}, "megatron_config is {'a': 1}: it is for Megatron's layers"),
        ({"target_parameters": ["q_proj.weight"]}, f"target_parameters is ['q_proj.weight']: {MERGE}"),
        ({"use_bdlora": {"nblocks": 2}}, f"use_bdlora is {{'nblocks': 2}}: {MERGE}"),
    ],
)
def test_a_config_of_another_kind_is_refused(
    target: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    adapter = save_adapter(tmp_path / "adapter", target)
    rewrite_json(adapter / "adapter_config.json", change)
    line = refusal(target, adapter)
    start, _, end = message.partition(f" {CONVERT}")
    assert start in line
    assert not message.endswith(CONVERT) or (CONVERT in line and not end)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_pattern_that_never_ends_is_given_up(
    target: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "SECONDS", 0.2)
    adapter = save_adapter(tmp_path / "adapter", target, seed=0, **{key: r"(.*).*(.*).*(.*).*(.*).*\1\2\3\4[A-Z]"})
    start = time.monotonic()
    assert f"of {key} takes too long: list module names instead" in refusal(target, adapter)
    assert time.monotonic() - start < 5
    rewrite_json(adapter / "adapter_config.json", {key: ["q_proj"] if key == "target_modules" else []})
    AdaptedCheckpoint(target, "target", [adapter])


def _of_module(change: str) -> Callable[[dict[str, Any]], None]:
    """Give the first module another name."""

    def rename(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ADAPTED[0] in name]:
            tensors[name.replace(ADAPTED[0], change)] = tensors.pop(name)

    return rename


A, B = (f"{PREFIX}{ADAPTED[0]}.lora_{side}.weight" for side in "AB")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (
            "has no module layers.0.self_attn.qkv: this adapter is of another model",
            _of_module("layers.0.self_attn.qkv"),
        ),
        ("has no module layers.99.mlp.up_proj: this adapter is of another", _of_module("layers.99.mlp.up_proj")),
        ("has no module layers.0.input_layernorm: this adapter", _of_module("layers.0.input_layernorm")),
        ("has no module layers.0.a\\nb: this adapter is of another", _of_module("layers.0.a\nb")),
        ("layers.0.self_attn.q_proj has no lora_B: the adapter is incomplete", lambda t: t.pop(B)),
        ("embed_tokens has no lora_embedding_A: the adapter is incomplete", _of_module("embed_tokens")),
        ("this adapter is of another model", lambda t: t.update({B: t[B][1:].clone()})),
        ("this adapter is of another model", lambda t: t.update({A: t[A][:, :3].clone()})),
        ("this adapter is of another model", lambda t: t.update({A: t[A].flatten()})),
        ("holds NaN", lambda t: t.update({B: t[B] * float("nan")})),
        ("or no floats: the adapter is damaged", lambda t: t.update({B: t[B].to(torch.int32)})),
        ("holds no tensors: this is no adapter", lambda t: t.clear()),
        ("are one tensor stored twice", lambda t: t.update({A.replace("A.w", "A.default.w"): t[A].clone()})),
        ("is of an adapter named 'mine', and PEFT reads", lambda t: t.update({A.replace("A.w", "A.mine.w"): t.pop(A)})),
        (
            "norm.weight is torch.float32 [3], expected floats",
            lambda t: t.update({f"{PREFIX}norm.weight": torch.ones(3)}),
        ),
        (
            "lm_head.weight is torch.float32 [3, 3], expected floats [128, 32]: the adapter was trained on a resized",
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3, 3)}),
        ),
        (
            "has no tensor layers.99.mlp.up_proj.weight: this adapter is of another model",
            lambda t: t.update({f"{PREFIX}layers.99.mlp.up_proj.weight": torch.ones(3, 3)}),
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    target: Path, tmp_path: Path, message: str, change: Callable[[dict[str, Any]], None]
) -> None:
    adapter = save_adapter(tmp_path / "adapter", target, target_modules=["q_proj", "down_proj", "embed_tokens"])
    rewrite_tensors(adapter / "adapter_model.safetensors", change)
    assert message in refusal(target, adapter)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(["q_proj", ".*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KINDS = ["lora_A", "lora_B", "base_layer", "modules_to_save", "token_adapter", "trainable_tokens_delta"]
PARTS = [*ADAPTED, *KINDS, "default", "weight", "bias", "lm_head", "embed_tokens", "", "\n", "9" * 5000]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(st.sampled_from([*READ, *HARMLESS, *PLAIN]), VALUES, max_size=3),
    names=st.lists(st.lists(st.sampled_from(PARTS), max_size=6), max_size=2),
)
def test_whatever_lies_in_the_files_is_merged_or_refused_on_a_line(
    tiny_source: Path, tmp_path: Path, values: dict[str, Any], names: list[list[str]]
) -> None:
    target = tiny_source / "target"
    adapter = save_adapter(Path(tempfile.mkdtemp(dir=tmp_path)) / "adapter", target)
    rewrite_json(adapter / "adapter_config.json", values)
    added = {f"{PREFIX}{'.'.join(name)}": torch.ones(RANK, 3) for name in names}
    rewrite_tensors(adapter / "adapter_model.safetensors", lambda t: t.update(added))
    try:
        printed = list(AdaptedCheckpoint(target, "target", [adapter]).left_aside)
    except CheckpointError as error:
        printed = [str(error)]
    assert all(line.isprintable() for line in printed)


def test_merging_that_gives_no_numbers_is_refused(target: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", target)
    rewrite_tensors(adapter / "adapter_model.safetensors", lambda t: t.update({A: t[A] * 1e30, B: t[B] * 1e30}))
    adapted = AdaptedCheckpoint(target, "target", [adapter])
    with pytest.raises(CheckpointError, match=r"gives NaN or infinity in layers\.0\.self_attn\.q_proj\.weight"):
        adapted.rows(f"{ADAPTED[0]}.weight", 0, 4)


def test_what_changes_nothing_is_left_aside(target: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", target, target_modules=["q_proj"])
    rewrite_json(adapter / "adapter_config.json", {"foo": 1, "a\nb": 2})

    def add(tensors: dict[str, Any]) -> None:
        for tower in ("vision_tower.encoder.layers.0.self_attn.q_proj.linear", "embed_vision.embedding_projection"):
            for side in "AB":
                tensors[f"base_model.model.model.{tower}.lora_{side}.weight"] = torch.ones(2, 2)
        tensors["base_model.model.model.audio_tower.norm.weight"] = torch.ones(3)
        tensors["base_model.model.score.weight"] = torch.ones(3)
        tensors[f"{PREFIX}layers.0.self_attn.q_proj.bias"] = torch.ones(3)

    rewrite_tensors(adapter / "adapter_model.safetensors", add)
    assert AdaptedCheckpoint(target, "target", [adapter]).left_aside == (
        "2 adapter pairs of the vision tower",
        "1 adapter tensors of modules that the model does not have",
        "1 adapter tensors of the audio tower",
        "adapter pairs of modules that adapter_config.json does not name (1)",
        "adapter tensors that the model does not read (1)",
        "adapter_config.json: `a\\nb`",
        "adapter_config.json: `foo`",
    )


def test_an_adapter_of_towers_alone_is_refused(target: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", target, prefix="base_model.model.model.vision_tower.")
    assert "(2 adapter pairs of the vision tower): leave it out" in refusal(target, adapter)


def test_missing_and_damaged_files_are_refused(target: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", target)
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "is damaged or truncated" in refusal(target, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing: save the adapter with PEFT" in refusal(target, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin can run code when it is loaded" in refusal(target, adapter)
    os.mkfifo(adapter / "adapter_model.safetensors")  # which would be waited for
    assert "adapter_model.bin can run code" in refusal(target, adapter)
    for text in ("{", "[" * 100_000, '{"r": 1' + "0" * 5000 + "}"):
        (adapter / "adapter_config.json").write_text(text, encoding="utf-8")
        assert "adapter_config.json is not JSON" in refusal(target, adapter)
    (adapter / "adapter_config.json").write_bytes(b"\xff")
    assert "adapter_config.json is no UTF-8 text: give a folder that PEFT saved" in refusal(target, adapter)
    (adapter / "adapter_config.json").write_text("[]", encoding="utf-8")
    assert "is no adapter's config" in refusal(target, adapter)
    (adapter / "adapter_config.json").unlink()
    os.mkfifo(adapter / "adapter_config.json")
    assert "is not a file" in refusal(target, adapter)
    assert "adapter_config.json is missing" in refusal(target, tmp_path / "nowhere")


def test_an_export_depends_on_its_adapters(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights are in what the target is made of, and their files in the manifest's inputs."""
    monkeypatch.setitem(MODELS, "tiny", tiny_model(tiny))
    adapter = save_adapter(tmp_path / "adapter", tiny / "target")
    arguments = [*pair_arguments(tiny), "--adapter", str(adapter), "--output", str(tmp_path / "out"), "--recipe", "f32"]
    options = dict(command.make_context("export", arguments).params)
    config = config_of(
        {name: value for name, value in options.items() if name not in ("dry_run", "resume", "as_json", "debug")}
    )
    pair = open_pair(config.source)
    inputs = [f"{part}/{path.name}" for part, path in input_files(pair)]
    assert inputs[-2:] == ["adapter_0/adapter_config.json", "adapter_0/adapter_model.safetensors"]
    name = f"{ADAPTED[0]}.weight"
    expected = merged_by_torch(tiny / "target", adapter, ADAPTED[0], ALPHA / RANK).numpy()
    np.testing.assert_allclose(pair.target.rows(name, 0, 9), expected[:9], atol=1e-6, rtol=1e-6)


def refusal(target: Path, adapter: Path) -> str:
    """The one line with which an adapter is refused."""
    with pytest.raises(CheckpointError) as caught:
        AdaptedCheckpoint(target, "target", [adapter])
    message = str(caught.value)
    assert "\n" not in message
    return message
