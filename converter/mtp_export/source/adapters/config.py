"""An adapter's `adapter_config.json`, read into what its merging needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtp_export.arch.json_object import shortened
from mtp_export.errors import CheckpointError
from mtp_export.source.adapters.fields import check_fields
from mtp_export.source.checkpoint import ADAPTER_CONFIG
from mtp_export.source.files import TextFile

_REMEDY = "give a folder that PEFT saved"
_MAX_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """Rank and scale of a module's pair."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilised: bool

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """Which modules the adapter changes by pairs; None stands for PEFT's choice for the architecture.

    layers: those of the model that are meant, None for all.
    """

    modules: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_patterns: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is read of an adapter's config.

    tokens: rows of embeddings that were trained, by the end of a module's name; None stands for the token embedding.
    random_start: PEFT would leave a module that the adapter names, and holds no tensors of, with random matrices.
    unknown: keys that PEFT does not know either.
    """

    where: str
    scaling: Scaling
    targets: Targets
    dora: bool
    modules_to_save: tuple[str, ...]
    tokens: Mapping[str | None, tuple[int, ...]]
    ties: bool
    random_start: bool
    unknown: tuple[str, ...]


def read_config(folder: Path) -> AdapterConfig:
    """Read the config of an adapter.

    Raises:
        CheckpointError: it is missing, damaged, of another kind than LoRA, or has a setting that cannot be merged.
    """
    path = folder / ADAPTER_CONFIG
    values = _read_json(path)
    where = str(path)
    unknown = check_fields(where, values)
    return AdapterConfig(
        where=where,
        scaling=_scaling(where, values),
        targets=_targets(where, values),
        dora=_flag(where, values, "use_dora"),
        modules_to_save=_names(where, values, "modules_to_save"),
        tokens=_tokens(where, values),
        ties=_flag(where, values, "ensure_weight_tying"),
        random_start=values.get("init_lora_weights", True) in (False, None, "orthogonal"),
        unknown=unknown,
    )


def _read_json(path: Path) -> dict[str, Any]:
    values = TextFile(
        path=path, max_bytes=_MAX_BYTES, kind="adapter's config", missing=_REMEDY, damaged=_REMEDY, remedy=_REMEDY
    ).read_json()
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no adapter's config: {_REMEDY}")
    return values


def _scaling(where: str, values: Mapping[str, Any]) -> Scaling:
    return Scaling(
        rank=_rank(where, "r", values.get("r", 8)),
        alpha=_number(where, "lora_alpha", values.get("lora_alpha", 8)),
        ranks={key: _rank(where, "rank_pattern", n) for key, n in _pattern(where, values, "rank_pattern").items()},
        alphas={key: _number(where, "alpha_pattern", n) for key, n in _pattern(where, values, "alpha_pattern").items()},
        rank_stabilised=_flag(where, values, "use_rslora"),
    )


def _rank(where: str, key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise CheckpointError(f"{where}: {key} is {shortened(value)}, expected a positive whole number")
    return value


def _number(where: str, key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise CheckpointError(f"{where}: {key} is {shortened(value)}, expected a number")
    return float(value)


def _flag(where: str, values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {shortened(value)}, expected true or false")
    return bool(value)


def _pattern(where: str, values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key} is {shortened(value)}, expected names with numbers")
    return value


def _names(where: str, values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = values.get(key) or ()
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(v and isinstance(v, str) for v in value):
        raise CheckpointError(f"{where}: {key} is {shortened(value)}, expected a list of names")
    return tuple(value)


def _targets(where: str, values: Mapping[str, Any]) -> Targets:
    modules, layers = values.get("target_modules"), values.get("layers_to_transform")
    layers_pattern, excluded = values.get("layers_pattern") or (), values.get("exclude_modules")
    if layers_pattern and layers is None:
        raise CheckpointError(f"{where}: layers_pattern is there without layers_to_transform: PEFT takes both or none")
    if isinstance(modules, str) and not (layers is None and values.get("layers_pattern") is None):
        raise CheckpointError(
            f"{where}: target_modules is a regular expression, beside which PEFT takes neither layers_to_transform nor "
            "layers_pattern: list module names"
        )
    if isinstance(layers, int):
        layers = [layers]
    if layers and not (
        isinstance(layers, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in layers)
    ):
        raise CheckpointError(f"{where}: layers_to_transform is {shortened(layers)}, expected numbers of layers")
    if isinstance(layers_pattern, str):
        layers_pattern = [layers_pattern]
    if not isinstance(modules, str | None):
        modules = _names(where, values, "target_modules")
    return Targets(
        modules=modules,
        excluded=excluded if isinstance(excluded, str) else _names(where, values, "exclude_modules"),
        layers=tuple(layers) if layers else None,
        layers_patterns=_names(where, {"layers_pattern": layers_pattern}, "layers_pattern"),
    )


def _tokens(where: str, values: Mapping[str, Any]) -> Mapping[str | None, tuple[int, ...]]:
    value = values.get("trainable_token_indices")
    if value is None:
        return {}
    named: Mapping[str | None, Any] = value if isinstance(value, dict) else {None: value}
    for name, tokens in named.items():
        whole = isinstance(tokens, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in tokens)
        if name == "" or not whole or len(set(tokens)) < len(tokens):
            raise CheckpointError(f"{where}: trainable_token_indices is not a list of tokens, each once")
    return {name: tuple(tokens) for name, tokens in named.items() if tokens}
