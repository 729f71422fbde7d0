"""Trained rows of embeddings (`trainable_token_indices`): which tables an adapter changes by them, as PEFT decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from mtp_export.arch.json_object import shortened
from mtp_export.errors import CheckpointError
from mtp_export.source.adapters.config import AdapterConfig
from mtp_export.source.adapters.modules import EMBEDDING, EMBEDDINGS, HEAD, TextModel, spelled
from mtp_export.source.adapters.tensors import AdapterTensors

_KEY = "trainable_token_indices"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRows:
    """Rows of a table. Shapes: values [len(tokens),C]"""

    tokens: tuple[int, ...]
    values: Tensor


def trained_rows(
    model: TextModel, config: AdapterConfig, tensors: AdapterTensors, *, tied: bool
) -> Mapping[str, TrainedRows]:
    """Return the trained rows by module.

    Args:
        tied: whether the model's config ties head and embedding: then the embedding's rows are the head's too, unless
            the adapter has other rows for the head.

    Raises:
        CheckpointError: a table is not there, or its rows are not, or are of another size.
    """
    embedding = spelled(EMBEDDING, tensors.prefix)
    named = {embedding if name is None else name: tokens for name, tokens in config.tokens.items()}
    ends = [name for name in named if embedding.endswith(name) or HEAD.endswith(name)] if tied else []
    differ = any(named[name] != named[ends[0]] for name in ends)
    if differ and config.ties:
        raise CheckpointError(f"{config.where}: {_KEY} differs for head and embedding, which ensure_weight_tying ties")
    rows: dict[str, TrainedRows] = {}
    for name, tokens in named.items():
        if len(ends) > 1 and not differ and name == HEAD:
            continue
        for module in _tables(model, config, tensors.prefix, name):
            rows[module] = _checked(model, tensors, module, tokens)
    if tied and EMBEDDING in rows and (config.ties or not differ):
        rows[HEAD] = rows[EMBEDDING]
    return rows


def _tables(model: TextModel, config: AdapterConfig, prefix: str, end: str) -> list[str]:
    modules = [module for module in model.matrices() if spelled(module, prefix).endswith(end)]
    if not modules or not {*EMBEDDINGS, HEAD}.issuperset(modules):
        raise CheckpointError(f"{config.where}: {_KEY} names {shortened(end)}, which is no embedding of the text model")
    return modules


def _checked(model: TextModel, tensors: AdapterTensors, module: str, tokens: tuple[int, ...]) -> TrainedRows:
    vocabulary, columns = model.shapes[f"{module}.weight"]
    values = tensors.rows.get(module)
    if values is None:
        raise CheckpointError(f"{tensors.where} has no trained rows of {module}: the adapter is incomplete")
    if tuple(values.shape) != (len(tokens), columns):
        raise CheckpointError(
            f"{tensors.where}: the trained rows of {module} are {list(values.shape)}, expected "
            f"{[len(tokens), columns]}: this adapter is of another model"
        )
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise CheckpointError(
            f"{tensors.where}: trained rows of {module} are of tokens up to {max(tokens)}, and the checkpoint has "
            f"{vocabulary}: the adapter was trained on a resized vocabulary"
        )
    return TrainedRows(tokens=tokens, values=values)
