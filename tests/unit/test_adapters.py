"""LoRA adapters: merged rows against torch, and what is refused. The files have PEFT's names; PEFT is not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mtp_export.commands.export import command, config_of
from mtp_export.errors import CheckpointError
from mtp_export.pipeline import input_files, open_pair
from mtp_export.source.adapters import AdaptedCheckpoint
from mtp_export.source.checkpoint import Checkpoint, text_prefix
from tests.unit.tiny_files import MODELS, pair_arguments, rewrite_json, rewrite_tensors, tiny_model

ADAPTED = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
PREFIX = "base_model.model.model.language_model."
RANK, ALPHA = 4, 6


def save_adapter(folder: Path, target: Path, prefix: str = PREFIX, seed: int = 0, **config: Any) -> Path:
    """Write an adapter of two modules of the checkpoint `target`."""
    checkpoint, generator = Checkpoint(target, "target"), torch.Generator().manual_seed(seed)
    tensors = {}
    for module in ADAPTED:
        rows, columns = checkpoint.tensors[f"{text_prefix(checkpoint)}{module}.weight"].shape
        tensors[f"{prefix}{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"{prefix}{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config), encoding="utf-8")
    return folder


def merged_by_torch(target: Path, adapter: Path, module: str, scale: float) -> torch.Tensor:
    from safetensors.torch import load_file

    checkpoint, tensors = Checkpoint(target, "target"), load_file(adapter / "adapter_model.safetensors")
    (a,) = (value for name, value in tensors.items() if name.endswith(f".{module}.lora_A.weight"))
    (b,) = (value for name, value in tensors.items() if name.endswith(f".{module}.lora_B.weight"))
    name = f"{text_prefix(checkpoint)}{module}.weight"
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
        expected, name = (
            merged_by_torch(target, adapter, module, scale).numpy(),
            f"{text_prefix(adapted)}{module}.weight",
        )
        pieces = [adapted.rows(name, 0, 5), adapted.rows(name, 5, len(expected))]
        np.testing.assert_allclose(np.concatenate(pieces), expected, atol=1e-6, rtol=1e-6)
        assert np.abs(expected - Checkpoint(target, "target").rows(name, 0, len(expected))).max() > 0.1


def test_other_tensors_stay_and_several_adapters_add_up(target: Path, tmp_path: Path) -> None:
    adapters = [save_adapter(tmp_path / str(seed), target, seed=seed) for seed in (0, 1)]
    plain, adapted = Checkpoint(target, "target"), AdaptedCheckpoint(target, "target", adapters)
    embedding = f"{text_prefix(plain)}embed_tokens.weight"
    np.testing.assert_array_equal(adapted.rows(embedding, 0, 9), plain.rows(embedding, 0, 9))
    name = f"{text_prefix(plain)}{ADAPTED[0]}.weight"
    alone = [AdaptedCheckpoint(target, "target", [adapter]).rows(name, 0, 9) for adapter in adapters]
    expected = alone[0] + alone[1] - plain.rows(name, 0, 9)
    np.testing.assert_allclose(adapted.rows(name, 0, 9), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True, expected False: only plain LoRA is merged"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"peft_type": ...}, "peft_type is None, expected 'LORA'"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], expected None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changed"),
        ({"r": 8}, "has lora_A [4, "),
        ({"r": 0}, "r is 0, expected a positive number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', expected a positive number"),
        ({"rank_pattern": {"q_proj": "4"}}, "expected names with positive numbers"),
        ({"alpha_pattern": {"(q|k)_proj": 4}}, "alpha_pattern has '(q|k)_proj', expected the names of modules"),
    ],
)
def test_a_config_of_another_kind_is_refused(
    target: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    adapter = save_adapter(tmp_path / "adapter", target)
    rewrite_json(adapter / "adapter_config.json", change)
    assert message in refusal(target, adapter)


def test_tensors_that_do_not_fit_are_refused(target: Path, tmp_path: Path) -> None:
    a, b = (f"{PREFIX}{ADAPTED[0]}.lora_{side}.weight" for side in "AB")
    changes = {
        "the checkpoint has no module": lambda t: t.update(
            {a.replace("q_proj", "qkv"): t.pop(a), b.replace("q_proj", "qkv"): t.pop(b)}
        ),
        "has only lora_A: the adapter is incomplete": lambda t: t.pop(b),
        "lora_magnitude_vector is no lora_A or lora_B": lambda t: t.update({"x.lora_magnitude_vector": t[a].clone()}),
        "of another model": lambda t: t.update({b: t[b][1:].clone()}),
        "holds NaN": lambda t: t.update({b: t[b] * float("nan")}),
        "this is no adapter": lambda t: t.clear(),
    }
    for i, (message, change) in enumerate(changes.items()):
        adapter = save_adapter(tmp_path / str(i), target)
        rewrite_tensors(adapter / "adapter_model.safetensors", change)
        assert message in refusal(target, adapter)


def test_missing_and_damaged_files_are_refused(target: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", target)
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "is damaged or truncated" in refusal(target, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refusal(target, adapter)
    (adapter / "adapter_config.json").write_text("{", encoding="utf-8")
    assert "cannot be read as JSON" in refusal(target, adapter)
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
    pair = open_pair(config)
    inputs = [f"{part}/{path.name}" for part, path in input_files(pair)]
    assert inputs[-2:] == ["adapter_0/adapter_config.json", "adapter_0/adapter_model.safetensors"]
    name = f"{text_prefix(pair.target)}{ADAPTED[0]}.weight"
    expected = merged_by_torch(tiny / "target", adapter, ADAPTED[0], ALPHA / RANK).numpy()
    np.testing.assert_allclose(pair.target.rows(name, 0, 9), expected[:9], atol=1e-6, rtol=1e-6)


def refusal(target: Path, adapter: Path) -> str:
    """The one line with which an adapter is refused."""
    with pytest.raises(CheckpointError) as caught:
        AdaptedCheckpoint(target, "target", [adapter])
    message = str(caught.value)
    assert "\n" not in message
    return message
