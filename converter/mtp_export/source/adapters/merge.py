"""Merging adapters one after the other, as PEFT merges each into transformers' model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from mtp_export.arch.json_object import shortened
from mtp_export.errors import CheckpointError
from mtp_export.source.adapters.config import AdapterConfig, read_config
from mtp_export.source.adapters.modules import EMBEDDING, EMBEDDINGS, HEAD, Selection, TextModel, select
from mtp_export.source.adapters.pairs import Pair, PairReader
from mtp_export.source.adapters.patterns import SECONDS, Patterns
from mtp_export.source.adapters.steps import Chain, ColumnLengths, Float32, RowLengths, Step, TokenRows, Where
from mtp_export.source.adapters.tensors import AdapterTensors, read_tensors
from mtp_export.source.adapters.tokens import TrainedRows, trained_rows
from mtp_export.source.checkpoint import ADAPTER_CONFIG

EMBEDDING_WEIGHT, HEAD_WEIGHT = f"{EMBEDDING}.weight", f"{HEAD}.weight"
_TABLES = (EMBEDDING_WEIGHT, HEAD_WEIGHT)
_MOST_KEYS = 8  # that are listed of those that PEFT does not know


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merged:
    """A model with adapters merged into it.

    chains: the changed parameters, by canonical name. While head and embedding are tied, the embedding's is for both.
    origins: where the tables' values lie in the checkpoint.
    tied: whether head and embedding are one parameter.
    ties: what the model's config says of that, which differs from `tied` where both are stored and are not equal.
    """

    chains: Mapping[str, Chain]
    origins: Mapping[str, str]
    tied: bool
    ties: bool

    def chain(self, name: str) -> Chain:
        """Return the chain of a parameter."""
        key = EMBEDDING_WEIGHT if self.tied and name == HEAD_WEIGHT else name
        return self.chains.get(key) or Chain(origin=self.origins.get(key, key))

    def changed(self, name: str, chain: Chain) -> Merged:
        """Return the model with a changed parameter, which is head and embedding where they are tied."""
        key = EMBEDDING_WEIGHT if self.tied and name == HEAD_WEIGHT else name
        return dataclasses.replace(self, chains={**self.chains, key: chain})

    def untied(self) -> Merged:
        """Return the model with a head of its own, equal to the embedding."""
        if not self.tied:
            return self
        chains = {**self.chains, **{name: self.chain(name) for name in _TABLES}}
        return dataclasses.replace(self, chains=chains, tied=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """What an adapter changes in the model it is merged into.

    replaced: parameters that are read before anything is merged, in the order of the model.
    pairs, rows: by module.
    saved: parameters in copies of their modules, which take the modules' places in the end.
    """

    replaced: Mapping[str, Tensor]
    pairs: Mapping[str, Pair]
    rows: Mapping[str, TrainedRows]
    saved: Mapping[str, Tensor]
    ties_saved: bool


def read_changes(folder: Path, model: TextModel, *, ties: bool) -> tuple[Changes, tuple[str, ...]]:
    """Return what an adapter changes, and what of it is left aside.

    Args:
        ties: what the model's config says of head and embedding.

    Raises:
        CheckpointError: it is damaged, of another kind or model, or changes nothing.
    """
    config, tensors = read_config(folder), read_tensors(folder)
    patterns = Patterns(where=config.where, seconds=SECONDS)
    selection = select(model, config, patterns, tensors.prefix, tied=ties)
    _check_floats(model, tensors, selection)
    reader = PairReader(model, config, tensors, patterns)
    pairs = reader.pairs(selection)
    rows = trained_rows(model, config, tensors, tied=ties)
    _check_once(config, selection, rows)
    replaced, saved, unused = _whole(model, tensors, selection, rows)
    changes = Changes(replaced=replaced, pairs=pairs, rows=rows, saved=saved, ties_saved=selection.ties_saved)
    aside = (*tensors.left_aside, *reader.left_aside(pairs), *unused)
    if not (replaced or pairs or rows or saved):
        raise CheckpointError(
            f"{tensors.where}: nothing of this adapter changes the text model ({', '.join(aside)}): leave it out"
        )
    return changes, (*aside, *_unknown(config))


def _check_floats(model: TextModel, tensors: AdapterTensors, selection: Selection) -> None:
    whole = {name.rpartition(".")[0] for name in tensors.whole}
    changed = {*selection.pairs} & tensors.pairs.keys() | whole | tensors.rows.keys()
    if integers := sorted(changed & model.integers):
        raise CheckpointError(
            f"{tensors.where}: the checkpoint stores {integers[0]} as integers, and merging would quantise it anew: "
            "give the checkpoint in floats that the adapter was trained on"
        )


def _unknown(config: AdapterConfig) -> list[str]:
    named = [f"{ADAPTER_CONFIG}: `{key}`" for key in config.unknown[:_MOST_KEYS]]
    more = len(config.unknown) - len(named)
    return [*named, f"{ADAPTER_CONFIG}: {more} more keys"] if more else named


def _check_once(config: AdapterConfig, selection: Selection, rows: Mapping[str, TrainedRows]) -> None:
    """Check that a module is changed in one way: PEFT does not merge two.

    Raises:
        CheckpointError: it is changed in two ways.
    """
    saved = {name.rpartition(".")[0] for name in selection.saved}
    ways = {"target_modules": {*selection.pairs}, "trainable_token_indices": {*rows}, "modules_to_save": saved}
    for module in sorted(set().union(*ways.values())):
        named = [way for way, modules in ways.items() if module in modules]
        if len(named) > 1:
            raise CheckpointError(
                f"{config.where}: {' and '.join(named)} both change {module}, which PEFT does not merge: train one"
            )


def _whole(
    model: TextModel, tensors: AdapterTensors, selection: Selection, rows: Mapping[str, TrainedRows]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The whole parameters that PEFT reads in place of the model's, those it reads into copies, and what it ignores."""
    replaced: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    ignored = []
    for name, (tensor, inside) in tensors.whole.items():
        module = name.rpartition(".")[0]
        wrapped = module in selection.pairs or module in rows
        if name not in model.shapes or wrapped is not inside:
            if name not in model.shapes and name.endswith(".weight") and not model.lacks(module):
                raise CheckpointError(
                    f"{tensors.where}: the checkpoint has no tensor {shortened(name)[1:-1]}: this adapter is "
                    "of another model"
                )
            ignored.append(name)
            continue
        if tuple(tensor.shape) != model.shapes[name] or not tensor.is_floating_point():
            reason = "was trained on a resized vocabulary" if name in _TABLES else "is of another model"
            raise CheckpointError(
                f"{tensors.where}: {name} is {tensor.dtype} {list(tensor.shape)}, expected floats "
                f"{list(model.shapes[name])}: the adapter {reason}"
            )
        (saved if name in selection.saved else replaced)[name] = tensor
    for name in sorted(selection.saved - saved.keys()):
        raise CheckpointError(f"{tensors.where} has no {name}, which modules_to_save names: the adapter is incomplete")
    in_order = dict(sorted(replaced.items(), key=lambda item: item[0] == HEAD_WEIGHT))
    return in_order, saved, [f"adapter tensors that the model does not read ({len(ignored)})"] if ignored else []


def merge(merged: Merged, changes: Changes, stored: Callable[[str, Where], Float32], model: TextModel) -> Merged:
    """Merge an adapter, as PEFT does it: what is replaced is read first, then modules are changed in the order of the
    model, and copies take their modules' places.

    Args:
        stored: returns rows of a tensor of the checkpoint.
    """
    for name, tensor in changes.replaced.items():
        merged = merged.changed(name, Chain(origin=tensor))
    for module in _in_order({*changes.pairs, *changes.rows}):
        name = f"{module}.weight"
        chain = merged.chain(name)
        if module in changes.pairs:
            chain = chain.then(_step(changes.pairs[module], module, chain, stored, model.shapes[name][0]))
        if module in changes.rows:
            rows = changes.rows[module]
            chain = chain.then(TokenRows(rows.tokens, rows.values, model.shapes[name][0]))
        merged = merged.changed(name, chain)
    saved = {name: Chain(origin=tensor) for name, tensor in changes.saved.items()}
    if changes.ties_saved:  # the head is read last
        head = saved.pop(HEAD_WEIGHT)
        return dataclasses.replace(merged, chains={**merged.chains, **saved, EMBEDDING_WEIGHT: head}, tied=True)
    if not saved.keys().isdisjoint(_TABLES):
        merged = merged.untied()
    return dataclasses.replace(merged, chains={**merged.chains, **saved}, ties=merged.ties and merged.tied)


def _in_order(modules: Iterable[str]) -> list[str]:
    """Modules in the order in which PEFT merges them, as far as it matters: head and embedding may be one parameter."""
    return sorted(modules, key=lambda module: module == HEAD)


def _step(pair: Pair, module: str, chain: Chain, stored: Callable[[str, Where], Float32], rows: int) -> Step:
    if pair.lengths is None:
        return pair.low_rank
    if module in EMBEDDINGS:
        return ColumnLengths(pair.low_rank, pair.lengths, rows, lambda where: chain.rows(where, stored))
    return RowLengths(low_rank=pair.low_rank, lengths=pair.lengths)
