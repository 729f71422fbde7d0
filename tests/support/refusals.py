"""Exports of the tiny pair that must be refused before anything slow begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_export.config import ExportConfig, SourceConfig
from mtp_export.export import export
from mtp_runtime.errors import UserError
from tests.support.tiny_files import rewrite_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


class NothingSlow:
    """Is told of an export's progress, and ends it when the conversion begins."""

    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None:
        raise AssertionError(f"it was not refused before {stage}")

    def advance(self, done: int, name: str = "") -> None: ...


def config_of(folder: Path, **changes: Any) -> ExportConfig:
    """Return an export of the pair in `folder`; `changes` are fields of SourceConfig."""
    source = SourceConfig(model="tiny", target=str(folder / "target"), drafter=str(folder / "drafter"))
    return ExportConfig(source=dataclasses.replace(source, **changes), output=folder.parent / "output" / "out")


def refusal(folder: Path, **changes: Any) -> str:
    """Export what must not be exported; returns the line with which it is refused, before the conversion begins."""
    config = config_of(folder, **changes)
    with pytest.raises(UserError) as caught:
        export(config, NothingSlow())
    assert caught.value.exit_code == 2
    assert not config.output.parent.exists()
    return str(caught.value)


def tensors_of(folder: Path, change: Callable[[Tensors], None], part: str = "target") -> None:
    rewrite_tensors(folder / part / WEIGHTS, change)
