"""Reading and writing the pair's safetensors under the published names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tools.train_nano.model import Drafter, LanguageModel

_TARGET_PREFIX = "model.language_model."


def save_target(model: LanguageModel, path: Path) -> None:
    """Write the target in bfloat16."""
    _save(model, path, _TARGET_PREFIX)


def save_drafter(model: Drafter, path: Path) -> None:
    """Write the drafter in bfloat16; the token ordering stays int64."""
    _save(model, path, "")


def _save(model: nn.Module, path: Path, prefix: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    tensors = {n: (t.to(torch.bfloat16) if t.is_floating_point() else t).contiguous() for n, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def load_target(folder: Path, device: str | torch.device = "cpu") -> LanguageModel:
    """Return the target of `folder`, in float32."""
    model = LanguageModel(json.loads((folder / "config.json").read_text())["text_config"])
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix(_TARGET_PREFIX): tensor for name, tensor in tensors.items()})
    return model.to(device)


def load_drafter(folder: Path, device: str | torch.device = "cpu") -> Drafter:
    """Return the drafter of `folder`, in float32."""
    model = Drafter(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(device)
