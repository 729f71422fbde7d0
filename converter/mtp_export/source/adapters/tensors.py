"""An adapter's `adapter_model.safetensors`: its tensors by what they are for, in all the spellings that tools write.

A module of the model has `base_model.model.{module}.lora_A.weight` and `….lora_B.weight`, an embedding
`….lora_embedding_A` and `…_B`, both with `….lora_magnitude_vector` for DoRA. Trained rows of an embedding are
`{module}.token_adapter.trainable_tokens_delta`. What is saved whole has its name in the model, with `.base_layer` in it
where it lies inside a module with a pair.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mtp_export.arch.json_object import shortened
from mtp_export.errors import CheckpointError
from mtp_export.source.adapters.modules import HEAD, MULTIMODAL
from mtp_export.source.files import refuse_pointer
from mtp_export.source.names import OLD_LAYOUT, canonical_module

WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_NAME = "default"  # that PEFT gives an adapter, and some tools leave in the names of its tensors
_PAIRED = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_TOKENS, _ROWS = "token_adapter", "trainable_tokens_delta"
_WHOLE, _COPY, _ORIGINAL = "base_layer", "modules_to_save", "original_module"
_TOWERS: Mapping[str, tuple[str, ...]] = {
    "vision tower": ("vision_tower.", "embed_vision.", "multi_modal_projector.", "vision_embedder."),
    "audio tower": ("audio_tower.", "embed_audio."),
}
_TEXT_PARTS = ("layers.", "embed_tokens", "per_layer_model_projection", "per_layer_projection_norm", "norm", "lm_head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterTensors:
    """Tensors of an adapter, by canonical names.

    pairs: by module: the parts of its pair.
    whole: by parameter, with whether it lies inside a module with a pair or trained rows.
    rows: by module: trained rows.
    prefix: of the text model in the class that the adapter was trained on.
    left_aside: what is not of the text model.
    """

    where: str
    pairs: Mapping[str, Mapping[str, Tensor]]
    whole: Mapping[str, tuple[Tensor, bool]]
    rows: Mapping[str, Tensor]
    prefix: str
    left_aside: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a tensor is for: a part of a module, whole parameters being parts of theirs."""

    module: str
    kind: str
    inside: bool = False


def read_tensors(folder: Path) -> AdapterTensors:
    """Read the tensors of an adapter; their values stay in the file until they are needed.

    Raises:
        CheckpointError: the file is missing or damaged, holds none, one twice, or one under a name of its own.
    """
    path = folder / WEIGHTS
    tensors = _load(folder, path)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors: this is no adapter")
    pairs: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    whole: dict[str, tuple[Tensor, bool]] = {}
    rows: dict[str, Tensor] = {}
    prefixes: collections.Counter[str] = collections.Counter()
    aside: collections.Counter[str] = collections.Counter()
    taken: dict[tuple[str, str], str] = {}
    for key, tensor in tensors.items():
        place = _place(str(path), key)
        if place is None:
            continue
        module = canonical_module(place.module)
        if (other := _other_part(module, paired=place.kind in _PAIRED)) is not None:
            aside[other] += place.kind not in _PAIRED or place.kind.endswith("_A")
            continue
        if (first := taken.setdefault((module, place.kind), key)) != key:
            raise CheckpointError(
                f"{path}: {shortened(first)} and {shortened(key)} are one tensor stored twice: remove one"
            )
        if module != HEAD:
            prefixes[place.module.removesuffix(module)] += 1
        if place.kind in _PAIRED:
            pairs[module][place.kind] = _finite(str(path), key, tensor)
        elif place.kind == _ROWS:
            rows[module] = _finite(str(path), key, tensor)
        else:
            whole[f"{module}.{place.kind}"] = tensor, place.inside
    prefix = prefixes.most_common(1)[0][0] if prefixes else MULTIMODAL
    return AdapterTensors(
        where=str(path),
        pairs=pairs,
        whole=whole,
        rows=rows,
        prefix=MULTIMODAL if prefix == OLD_LAYOUT else prefix,
        left_aside=tuple(f"{count} {kind}" for kind, count in sorted(aside.items()) if count),
    )


def _load(folder: Path, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        if (folder / _PICKLED).exists():
            raise CheckpointError(
                f"{folder / _PICKLED} can run code when it is loaded: load the adapter with PEFT, where you trust it, "
                f"and save it again (save_pretrained), which writes {WEIGHTS}"
            )
        raise CheckpointError(f"{path} is missing: save the adapter with PEFT (save_pretrained), which writes it")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        refuse_pointer(path)
        raise CheckpointError(f"{path} is damaged or truncated ({error})") from error
    return tensors


def _place(where: str, key: str) -> _Place | None:
    """Return what a tensor is for; None for what PEFT keeps beside for training.

    Raises:
        CheckpointError: it is of an adapter with a name of its own.
    """
    parts = key.removeprefix(_PREFIX).split(".")
    at = next((n for n, part in enumerate(parts) if part.startswith("lora_") or part == _TOKENS), None)
    if at is None:
        return _place_of_whole(parts)
    module, kind, rest = ".".join(parts[:at]), parts[at], parts[at + 1 :]
    if kind == _TOKENS:
        if rest[:2] == [_WHOLE, "weight"]:
            return _Place(module, "weight", inside=True)
        kind, rest = (rest[0], rest[1:]) if rest else ("", [])
        if kind != _ROWS:
            return None
    elif kind not in _PAIRED:
        return None
    if rest[-1:] == ["weight"]:
        rest = rest[:-1]
    if rest not in ([], [_NAME]):
        if rest == ["bias"]:
            return None
        raise CheckpointError(
            f"{where}: {shortened(key)} is of an adapter named {shortened('.'.join(rest))}, and PEFT reads "
            "tensors without a name: load the folder with PEFT under this adapter_name and save it again"
        )
    return _Place(module, kind)


def _place_of_whole(parts: list[str]) -> _Place | None:
    if _ORIGINAL in parts:
        return None
    if _COPY in parts[:-1]:
        at = parts.index(_COPY)
        rest = parts[at + 1 :]
        parts = parts[:at] + (rest[1:] if rest[0] == _NAME and len(rest) > 1 else rest)
    inside = len(parts) > 2 and parts[-2] == _WHOLE
    return _Place(".".join(parts[: -2 if inside else -1]), parts[-1], inside=inside)


def _other_part(module: str, *, paired: bool) -> str | None:
    """Return what a module belongs to that is not the text model, None for the text model's."""
    noun = "adapter pairs" if paired else "adapter tensors"
    for tower, names in _TOWERS.items():
        if any(f".{name}" in f".{module}." for name in names):
            return f"{noun} of the {tower}"
    if not paired and not module.startswith(_TEXT_PARTS):
        return "adapter tensors of modules that the model does not have"
    return None


def _finite(where: str, key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise CheckpointError(f"{where}: {shortened(key)} holds NaN, infinity or no floats: the adapter is damaged")
    return tensor
