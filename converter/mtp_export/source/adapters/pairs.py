"""The low-rank pairs of an adapter: checked against the model, scaled, and ready to merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from mtp_export.arch.json_object import shortened
from mtp_export.errors import CheckpointError
from mtp_export.source.adapters.config import AdapterConfig
from mtp_export.source.adapters.modules import EMBEDDING, EMBEDDINGS, HEAD, NO_PAIRS, Selection, TextModel, spelled
from mtp_export.source.adapters.patterns import Patterns
from mtp_export.source.adapters.steps import LowRank
from mtp_export.source.adapters.tensors import AdapterTensors

_Number = TypeVar("_Number", int, float)
_LENGTHS = "lora_magnitude_vector"
_SIDES, _LOOKED_UP_SIDES = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """What is added to a module's matrix, and with DoRA the lengths of its rows, or of an embedding's columns.

    Shapes: lengths [rows], of an embedding [columns]
    """

    low_rank: LowRank
    lengths: Tensor | None


class PairReader:
    """Reads the pairs of one adapter."""

    def __init__(self, model: TextModel, config: AdapterConfig, tensors: AdapterTensors, patterns: Patterns) -> None:
        """Compile the adapter's patterns of ranks and scales.

        Raises:
            CheckpointError: one is none, or too large.
        """
        self._model, self._config, self._tensors = model, config, tensors
        self._ranks = _compiled(patterns, "rank_pattern", config.scaling.ranks)
        self._alphas = _compiled(patterns, "alpha_pattern", config.scaling.alphas)

    def pairs(self, selection: Selection) -> dict[str, Pair]:
        """Return the pairs by module.

        Raises:
            CheckpointError: one is incomplete, or does not fit the model.
        """
        parts = dict(self._tensors.pairs)
        for module in parts:
            self._check_module(module)
        if selection.ties_pairs:
            self._tie(parts)
        pairs = {
            module: self._pair(module, parts[module], shared=selection.ties_pairs and module == HEAD)
            for module in selection.pairs
            if module in parts
        }
        untrained = [module for module in selection.pairs if module not in parts]
        if untrained and self._config.random_start:
            raise CheckpointError(
                f"{self._tensors.where} has no tensors of {untrained[0]}, which {self._config.where} names and starts "
                "at random: the adapter is incomplete"
            )
        if not (selection.pairs or parts or self._tensors.left_aside or self._config.targets.modules == NO_PAIRS):
            raise CheckpointError(f"{self._config.where}: target_modules names no module of the model")
        return pairs

    def left_aside(self, pairs: Mapping[str, Pair]) -> list[str]:
        """Return the kinds of the adapter's pairs that change nothing, with counts."""
        lacking = [module for module in self._tensors.pairs if self._model.lacks(module)]
        unnamed = [m for m in self._tensors.pairs if m not in pairs and m not in lacking]
        lengths = [] if self._config.dora else [m for m in pairs if _LENGTHS in self._tensors.pairs.get(m, ())]
        counts = {
            "adapter pairs of keys and values that KV-sharing layers do not have": len(lacking),
            "adapter pairs of modules that adapter_config.json does not name": len(unnamed),
            "lengths of DoRA, which adapter_config.json does not use": len(lengths),
        }
        return [f"{kind} ({count})" for kind, count in counts.items() if count]

    def _check_module(self, module: str) -> None:
        if self._model.lacks(module) or len(self._model.shapes.get(f"{module}.weight", ())) == 2:
            return
        raise CheckpointError(
            f"{self._tensors.where}: the checkpoint has no module {shortened(module)[1:-1]}: this adapter is "
            "of another model"
        )

    def _tie(self, parts: dict[str, Mapping[str, Tensor]]) -> None:
        """Give head and embedding the same pair: the head's where there is one, as it is read last."""
        head, embedding = parts.get(HEAD, {}), parts.get(EMBEDDING, {})
        for ours, theirs in zip(_SIDES, reversed(_LOOKED_UP_SIDES), strict=True):
            if ours in head:
                embedding = {**embedding, theirs: head[ours].T}
            elif theirs in embedding:
                head = {**head, ours: embedding[theirs].T}
        parts |= {module: part for module, part in ((HEAD, head), (EMBEDDING, embedding)) if part}

    def _pair(self, module: str, parts: Mapping[str, Tensor], *, shared: bool) -> Pair:
        """A module's pair; with `shared` its matrices are the embedding's, and the scale is its own all the same."""
        looked_up = module in EMBEDDINGS
        names = [*(_LOOKED_UP_SIDES if looked_up else _SIDES), *([_LENGTHS] if self._config.dora else [])]
        missing = [part for part in names if part not in parts]
        if missing:
            raise CheckpointError(f"{self._tensors.where}: {module} has no {missing[0]}: the adapter is incomplete")
        first, second = parts[names[0]], parts[names[1]]
        a, b = (second.T, first.T) if looked_up else (first, second)
        rank = self._rank(module)
        self._check_shapes(module, names, parts, self._rank(EMBEDDING) if shared else rank)
        alpha = _of_module(self._alphas, spelled(module, self._tensors.prefix), self._config.scaling.alpha)
        scale = self._config.scaling.scale(rank, alpha)
        return Pair(low_rank=LowRank(a=a, b=b, scale=scale), lengths=parts[_LENGTHS] if self._config.dora else None)

    def _rank(self, module: str) -> int:
        return _of_module(self._ranks, spelled(module, self._tensors.prefix), self._config.scaling.rank)

    def _check_shapes(self, module: str, names: Sequence[str], parts: Mapping[str, Tensor], rank: int) -> None:
        rows, columns = self._model.shapes[f"{module}.weight"]
        first, second, length = (rows, columns, columns) if module in EMBEDDINGS else (columns, rows, rows)
        expected = ((rank, first), (second, rank), (length,))
        actual = [tuple(parts[part].shape) for part in names]
        if all(shape == fitting for shape, fitting in zip(actual, expected, strict=False)):
            return
        reason = "this adapter is of another model"
        if len(actual[0]) == len(actual[1]) == 2 and (actual[0][1], actual[1][0]) == (first, second):
            reason = f"adapter_config.json has the rank {rank}"
        elif module in (EMBEDDING, HEAD) and columns in actual[0] + actual[1]:
            reason = "the adapter was trained on a resized vocabulary"
        shapes = " and ".join(f"{part} {list(shape)}" for part, shape in zip(names, actual, strict=True))
        fitting = " and ".join(str(list(shape)) for shape in expected[: len(actual)])
        raise CheckpointError(f"{self._tensors.where}: {module} has {shapes}, expected {fitting}: {reason}")


def _compiled(
    patterns: Patterns, key: str, values: Mapping[str, _Number]
) -> list[tuple[Callable[[str], bool], _Number]]:
    return [(patterns.compiled(key, rf"(.*\.)?({pattern})$", whole=False), value) for pattern, value in values.items()]


def _of_module(patterns: Sequence[tuple[Callable[[str], bool], _Number]], name: str, default: _Number) -> _Number:
    """Return a setting of one module: that of the first pattern that matches the end of its name."""
    return next((value for matches, value in patterns if matches(name)), default)
