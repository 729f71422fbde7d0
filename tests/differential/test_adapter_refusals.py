"""What is refused of adapters, against what PEFT has; and each remedy that a refusal names is followed."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from mtp_export.errors import CheckpointError
from mtp_export.source.adapters import AdaptedCheckpoint
from mtp_export.source.adapters.fields import HARMLESS, MERGE, PLAIN, READ, UNMERGEABLE
from tests.differential.adapters import (
    NANO,
    base_model,
    change,
    changed_config,
    check_merged,
    merged_by_peft,
    rewritten_tensors,
    train,
)

Q = ["q_proj"]
NAME = "layers.0.self_attn.q_proj.weight"


def test_every_setting_of_peft_is_decided_upon() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    decided = [*READ, *HARMLESS, *PLAIN]
    assert set(decided) == fields
    assert len(decided) == len(fields)
    for name, (plain, _) in PLAIN.items():
        assert getattr(LoraConfig(), name) in plain


def test_the_kinds_that_peft_cannot_merge() -> None:
    unmergeable = set()
    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        merging = [c for c in _layers(tuner) if "NotImplementedError" not in inspect.getsource(c.merge)]
        if not issubclass(tuner, BaseTuner) or not merging:
            unmergeable.add(kind.value)
    assert unmergeable == set(UNMERGEABLE)


def _layers(tuner: Any) -> list[Any]:
    """Classes of layers of a kind of adapter that have a merge of their own."""
    package = tuner.__module__.rpartition(".")[0]
    names = [tuner.__module__, *(f"{package}.{name}" for name in ("layer", "layers"))]
    modules = [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]
    classes: set[Any] = {c for module in modules for c in vars(module).values() if inspect.isclass(c)}
    return [c for c in classes if issubclass(c, BaseTunerLayer) and c.merge is not BaseTunerLayer.merge]


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind is not PeftType.LORA])
def test_other_kinds_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    changed_config(peft_type=kind)(tmp_path)
    remedy = "no merged weights do what it does" if kind in UNMERGEABLE else MERGE
    assert f"peft_type is '{kind}', expected 'LORA': {remedy}" in _refusal(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=Q, feedforward_modules=[]),
        LoraConfig(target_modules=Q, use_bdlora={"target_modules_bd_b": Q, "nblocks": 2}),
        LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]),
    ],
    ids=["IA3", "BD-LoRA", "target_parameters"],
)
def test_merging_it_with_peft_is_a_remedy(config: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(base_model(NANO), config)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "ia3_" in name or "lora_" in name:
                    parameter.add_(0.1)
        tuned.save_pretrained(str(tmp_path / "adapter"))
        assert MERGE in _refusal(tmp_path / "adapter")
        merged = PeftModel.from_pretrained(base_model(NANO), str(tmp_path / "adapter")).merge_and_unload()
        merged.save_pretrained(str(tmp_path / "merged"))
    expected = dict(merged.model.language_model.named_parameters())[NAME].detach().numpy()
    ours = AdaptedCheckpoint(tmp_path / "merged", "target", []).rows(NAME, 0, len(expected))
    np.testing.assert_array_equal(ours, expected)
    assert not np.array_equal(ours, AdaptedCheckpoint(NANO, "target", []).rows(NAME, 0, len(expected)))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_converting_it_is_a_remedy_for_a_start_that_changed_the_model(start: str, tmp_path: Path) -> None:
    """As PEFT tells to do it: the start is kept beside, and the difference to it is saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(base_model(NANO), LoraConfig(r=4, target_modules=Q, init_lora_weights=start))
        tuned.peft_config["default"].init_lora_weights = True
        tuned.save_pretrained(str(tmp_path / "start"))
        tuned.peft_config["default"].init_lora_weights = start
        change(tuned)
        tuned.save_pretrained(str(tmp_path / "adapter"))
        assert "with path_initial_model_for_weight_conversion" in _refusal(tmp_path / "adapter")
        tuned.save_pretrained(
            str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
        trained = copy.deepcopy(tuned).merge_and_unload().model.language_model.layers[0].self_attn.q_proj.weight
    check_merged(
        adapted := AdaptedCheckpoint(NANO, "target", [tmp_path / "converted"]),
        merged_by_peft(NANO, [tmp_path / "converted"]),
    )
    np.testing.assert_allclose(adapted.rows(NAME, 0, 256), trained.detach().numpy(), atol=1e-5)


def test_saving_it_again_is_a_remedy_for_pickled_tensors(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(base_model(NANO), LoraConfig(target_modules=Q))
        change(tuned)
        tuned.save_pretrained(str(tmp_path / "pickled"), safe_serialization=False)
        assert "adapter_model.bin can run code when it is loaded" in _refusal(tmp_path / "pickled")
        again = PeftModel.from_pretrained(base_model(NANO), str(tmp_path / "pickled"))
        again.save_pretrained(str(tmp_path / "again"))
    expected = merged_by_peft(NANO, [tmp_path / "pickled"])
    check_merged(AdaptedCheckpoint(NANO, "target", [tmp_path / "again"]), expected)


def test_loading_it_under_its_name_is_a_remedy(tmp_path: Path) -> None:
    adapter = train(tmp_path / "adapter", NANO, target_modules=Q)
    expected = merged_by_peft(NANO, [adapter])
    rewritten_tensors(lambda name: name.replace(".weight", ".mine.weight"))(adapter)
    assert "is of an adapter named 'mine'" in _refusal(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(base_model(NANO), str(adapter), adapter_name="mine")
        again.save_pretrained(str(tmp_path / "again"))
    check_merged(AdaptedCheckpoint(NANO, "target", [tmp_path / "again" / "mine"]), expected)


@pytest.mark.parametrize(
    ("options", "both"),
    [
        ({"target_modules": ["lm_head"], "trainable_token_indices": [3]}, "target_modules and trainable_token_indices"),
        (
            {"target_modules": Q, "modules_to_save": ["lm_head"], "trainable_token_indices": [3]},
            "trainable_token_indices and modules_to_save",
        ),
    ],
    ids=str,
)
def test_what_peft_does_not_merge_as_it_was_trained(options: Mapping[str, Any], both: str, tmp_path: Path) -> None:
    """Where two ways change one module, PEFT leaves its own tensors in the merged model, or drops what it trained."""
    adapter = train(tmp_path / "adapter", NANO, r=4, **options)
    assert f"{both} both change" in _refusal(adapter)


def _refusal(adapter: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        AdaptedCheckpoint(NANO, "target", [adapter])
    message = str(caught.value)
    assert "\n" not in message
    return message
