"""LoRA adapters as PEFT saves them, merged into a checkpoint's rows as they are read.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, in which a matrix W of the model has
`base_model.model.{its module}.lora_A.weight` [r, columns] and `….lora_B.weight` [rows, r]. The merged matrix is
W + s · B @ A with s = alpha / r, or alpha / sqrt(r) with `use_rslora`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mtp_export.errors import CheckpointError
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.names import canonical_module

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Settings that change what an adapter means, with the value that leaves it plain LoRA.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
}
# Ways to start training that change the model's own weights too: the adapter belongs to those, not to the checkpoint.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """What an adapter adds to a matrix: scale · b @ a. Shapes: a [r,C], b [R,r]"""

    a: Tensor
    b: Tensor
    scale: float

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Shapes: -> [stop - start, C]"""
        delta: NDArray[np.float32] = (self.scale * (self.b[start:stop] @ self.a)).numpy()
        return delta


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint whose rows have adapters merged in."""

    def __init__(self, folder: Path, part: str, adapters: Sequence[Path]) -> None:
        """Open the checkpoint and its adapters, which add up.

        Raises:
            CheckpointError: one of them is damaged, of another kind than LoRA, or of another model.
        """
        super().__init__(folder, part)
        self.left_aside: tuple[str, ...] = ()
        self._deltas: dict[str, list[Delta]] = {}
        for adapter in adapters:
            for name, delta in read_adapter(adapter, self).items():
                self._deltas.setdefault(name, []).append(delta)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """As of the checkpoint, merged. Shapes: -> [stop - start, …]"""
        rows = super().rows(name, start, stop)
        for delta in self._deltas.get(name, ()):
            rows = rows + delta.rows(start, stop)
        return rows


def adapter_files(folder: Path) -> list[Path]:
    """The files of an adapter that an export depends on."""
    return [folder / _CONFIG, folder / _WEIGHTS]


def read_adapter(folder: Path, checkpoint: Checkpoint) -> dict[str, Delta]:
    """What an adapter adds to which of the checkpoint's tensors.

    Raises:
        CheckpointError: it is damaged, of another kind than LoRA, or of another model.
    """
    config = _read_config(folder)
    path = folder / _WEIGHTS
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: save the adapter as safetensors") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error})") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{path}: {key} is no lora_A or lora_B of a projection: merge this adapter yourself")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise CheckpointError(f"{path} holds no tensors: this is no adapter")
    return dict(_delta(path, config, module, sides[module], checkpoint) for module in sorted(sides))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: give a folder that PEFT saved") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no adapter's config: give a folder that PEFT saved")
    for key, plain in _PLAIN.items():
        value = config.get(key, plain[0] if key != "peft_type" else None)
        if value not in plain:
            raise CheckpointError(f"{path}: {key} is {value!r}, expected {plain[0]!r}: only plain LoRA is merged")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGED_BASE):
        raise CheckpointError(f"{path}: init_lora_weights is {start!r}, which changed the model's own weights too")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or isinstance(config[key], bool) or not config[key] > 0:
            raise CheckpointError(f"{path}: {key} is {config.get(key)!r}, expected a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(isinstance(v, int | float) and v > 0 for v in pattern.values()):
            raise CheckpointError(f"{path}: {key} is {pattern!r}, expected names with positive numbers")
        unread = [name for name in pattern if not re.fullmatch(r"[\w.]+", name)]
        if unread:  # PEFT takes regular expressions; a stranger's can be made to run for ever
            raise CheckpointError(f"{path}: {key} has {unread[0]!r}, expected the names of modules: merge it yourself")
    return config


def _delta(
    path: Path, config: Mapping[str, Any], module: str, sides: Mapping[str, Tensor], checkpoint: Checkpoint
) -> tuple[str, Delta]:
    """The tensor that a module's matrices are for, and what they add to it."""
    if sides.keys() != {"A", "B"}:
        raise CheckpointError(f"{path}: {module} has only lora_{''.join(sides)}: the adapter is incomplete")
    name = f"{canonical_module(module)}.weight"
    info = checkpoint.tensors.get(name)
    if checkpoint.formats and (info is None or info.dtype == "I8"):
        raise CheckpointError(
            f"{path}: the checkpoint stores {module} as integers, and merging would quantise it anew: "
            "give the checkpoint in floats that the adapter was trained on"
        )
    if info is None:
        raise CheckpointError(f"{path}: the checkpoint has no module {module}: this adapter is of another model")
    a, b = sides["A"], sides["B"]
    rank = _of_module(config, "rank_pattern", "r", module)
    expected = (rank, info.shape[-1]), (info.shape[0], rank)
    if (tuple(a.shape), tuple(b.shape)) != expected or len(info.shape) != 2:
        raise CheckpointError(
            f"{path}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
            f"expected {list(expected[0])} and {list(expected[1])}: this adapter is of another model"
        )
    for tensor in (a, b):
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {module} holds NaN, infinity or no floats: the adapter is damaged")
    alpha = _of_module(config, "alpha_pattern", "lora_alpha", module)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return name, Delta(a=a.float(), b=b.float(), scale=scale)


def _of_module(config: Mapping[str, Any], pattern: str, default: str, module: str) -> Any:
    """A setting of one module: that of the first name in the pattern that ends the module's."""
    for key, value in (config.get(pattern) or {}).items():
        if f".{module}".endswith(f".{key}"):
            return value
    return config[default]
