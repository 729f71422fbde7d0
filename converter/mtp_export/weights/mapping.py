"""Which stored tensor, in which format, becomes which parameter of a graph."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_export.arch.spec import DrafterSpec
from mtp_export.formats.roles import ROLES
from mtp_export.graph.ir import TracedGraph
from mtp_export.source.checkpoint import EMBEDDINGS, Checkpoint, check_tensors, read_token_ordering
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.quantise import quantise
from mtp_export.weights.recipes import FLOAT32, INT8, Recipe, WeightFormat

_EMBEDDING = EMBEDDINGS["drafter"]
_ORDERING = "masked_embedding.token_ordering"
_PLACES = "masked_embedding.token_places"
_TABLE = "masked_embedding.table"
_ROW_SCALES = "masked_embedding.row_scales"
_MAY_DRAFT = "masked_embedding.may_draft"
_DERIVED = frozenset({_TABLE, _ROW_SCALES, _ORDERING, _PLACES, _MAY_DRAFT})  # made of the embedding and its ordering
_CENTROIDS = "masked_embedding.centroids.weight"


def target_parameters(
    checkpoint: Checkpoint, graphs: Iterable[TracedGraph], recipe: Recipe
) -> dict[str, dict[str, Parameter]]:
    """Return the parameters of the graphs that are made from the target's checkpoint, by role and name.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or dtype.
    """
    graphs = list(graphs)
    check_tensors(checkpoint, target_tensors(graphs))
    return {
        graph.role: {
            name: _of_target(checkpoint, name, shape, graph.role, recipe) for name, shape in graph.weights.items()
        }
        for graph in graphs
    }


def target_tensors(graphs: Iterable[TracedGraph]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a target's graphs are made of, by canonical name, and their shapes."""
    return {name: shape for graph in graphs for name, shape in graph.weights.items()}


def drafter_tensors(graph: TracedGraph, spec: DrafterSpec) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a drafter's graph is made of: its embedding becomes the clustered table."""
    stored = {name: shape for name, shape in graph.weights.items() if name not in _DERIVED}
    return stored | {_EMBEDDING: (spec.vocab_size, spec.hidden_size), _ORDERING: (spec.vocab_size,)}


def _of_target(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], role: str, recipe: Recipe) -> Parameter:
    """A matrix that the checkpoint stores as integers stays as it is, whatever the recipe says."""
    looked_up = ROLES[role].looks_up
    format = target_format(role, name, shape, recipe)
    if name == EMBEDDINGS["target"] and not looked_up and not checkpoint.formats:
        # Which one the head is may take reading both, so it is looked up with the first rows: a plan reads none.
        return Parameter(shape=shape, format=format, rows=lambda a, b: checkpoint.rows(checkpoint.head, a, b))
    place = name
    if name == EMBEDDINGS["target"]:
        place = checkpoint.embedding if looked_up else checkpoint.head
    matrix = checkpoint.quantised(place, shape)
    if matrix is None:
        return _stored(checkpoint, place, shape, format, looked_up=looked_up)
    return Parameter(
        shape=shape,
        format=matrix.format,
        rows=functools.partial(checkpoint.quantised_rows, matrix),
        stored=True,
        looked_up=looked_up,
    )


def target_format(role: str, name: str, shape: tuple[int, ...], recipe: Recipe) -> WeightFormat:
    """Return the format that a recipe gives to a parameter of the target, by its name and the role of its graph."""
    if len(shape) == 1:
        return FLOAT32
    if name == "embed_tokens.weight":
        format = recipe.embedding if ROLES[role].looks_up else recipe.head
    elif name == "embed_tokens_per_layer.weight":
        format = recipe.per_layer_embedding
    else:
        format = _linear_format(name, recipe)
    return format.for_columns(shape[1])


def _linear_format(name: str, recipe: Recipe) -> WeightFormat:
    return INT8 if name.split(".")[-2] in recipe.linear_int8 else recipe.linear


def drafter_parameters(
    checkpoint: Checkpoint, graph: TracedGraph, spec: DrafterSpec, recipe: Recipe, never_drafted: Sequence[int] = ()
) -> dict[str, Parameter]:
    """Parameters of the drafter; its embedding becomes the clustered table, in the form that the graph has it in.
    It never drafts a token of `never_drafted`.

    Raises:
        CheckpointError: as for the target.
    """
    check_tensors(checkpoint, drafter_tensors(graph, spec))
    parameters = {
        name: _stored(checkpoint, name, shape, _drafter_format(name, shape, recipe))
        for name, shape in graph.weights.items()
        if name not in _DERIVED
    }
    order = _ClusterOrder(checkpoint=checkpoint, spec=spec, never_drafted=never_drafted)
    table = _clustered_table(order, graph.weights[_TABLE], row_scales=_ROW_SCALES in graph.weights)
    return {name: value for name, value in (parameters | table).items() if name in graph.weights}


def token_ordering(checkpoint: Checkpoint, spec: DrafterSpec) -> NDArray[np.int64]:
    """Return the drafter's vocabulary, a row for each cluster. Shapes: -> [clusters, V / clusters]

    Raises:
        CheckpointError: it is no permutation.
    """
    return read_token_ordering(checkpoint, _ORDERING, spec.vocab_size).reshape(spec.head.num_centroids, -1)


def _drafter_format(name: str, shape: tuple[int, ...], recipe: Recipe) -> WeightFormat:
    if len(shape) == 1 or name == _CENTROIDS:
        return FLOAT32
    return _linear_format(name, recipe).for_columns(shape[1])


def _stored(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], format: WeightFormat, *, looked_up: bool = False
) -> Parameter:
    return Parameter(shape=shape, format=format, rows=functools.partial(checkpoint.rows, name), looked_up=looked_up)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ClusterOrder:
    """The drafter's vocabulary in cluster order, a row for each cluster, and what the graph looks up in it.

    The checkpoint is read at the first use, since a plan reads nothing. `never_drafted` are token ids.
    """

    checkpoint: Checkpoint
    spec: DrafterSpec
    never_drafted: Sequence[int]

    @functools.cached_property
    def ordering(self) -> NDArray[np.int64]:
        """Shapes: -> [clusters, V / clusters]"""
        return token_ordering(self.checkpoint, self.spec)

    def token_ids(self, start: int, stop: int) -> NDArray[np.int32]:
        return self.ordering[start:stop].astype(np.int32)

    def may_draft(self, start: int, stop: int) -> NDArray[np.float32]:
        return np.isin(self.ordering[start:stop], self.never_drafted, invert=True).astype(np.float32)

    def token_places(self, start: int, stop: int) -> NDArray[np.int32]:
        return self._places[start:stop]

    @functools.cached_property
    def _places(self) -> NDArray[np.int32]:
        """A token that is never drafted has the score of the first that may be, which wins where they are equal; those
        before it are left as they are."""
        by_token = np.argsort(self.ordering, axis=None).astype(np.int32)
        first = next((token for token in range(self.spec.vocab_size) if token not in self.never_drafted), 0)
        by_token[[token for token in self.never_drafted if token > first]] = by_token[first]
        return by_token

    def embeddings(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the embeddings of some clusters' tokens. Shapes: -> [tokens,H]"""
        return self.checkpoint.rows_at(self.checkpoint.head, self.ordering[start:stop].reshape(-1))


def _clustered_table(order: _ClusterOrder, shape: tuple[int, ...], *, row_scales: bool) -> dict[str, Parameter]:
    """The embedding in cluster order: float32, or int8 with the tokens' scales apart where the graph multiplies by
    them. A table of three axes holds the tokens of a cluster as columns, one of two axes as rows one after another."""
    spec = order.spec
    clusters, size = spec.head.num_centroids, spec.head.cluster_size

    def laid_out(rows: NDArray[Any]) -> NDArray[Any]:
        if len(shape) == 2:
            return rows.reshape(-1, shape[1])
        return rows.reshape(-1, size, spec.hidden_size).transpose(0, 2, 1)

    def table(start: int, stop: int) -> NDArray[Any]:
        return laid_out(order.embeddings(start, stop))

    def table_int8(start: int, stop: int) -> NDArray[Any]:
        return laid_out(quantise(order.embeddings(start, stop), INT8)[0])

    def scales(start: int, stop: int) -> NDArray[np.float32]:
        # A row of scales stands for a whole cluster of embeddings, so a block of them is cut up further.
        bounds = [(i, min(i + 64, stop)) for i in range(start, stop, 64)]
        return np.concatenate([quantise(order.embeddings(*some), INT8)[1].reshape(-1, size) for some in bounds])

    parameters = {
        _ORDERING: Parameter(shape=(clusters, size), format=FLOAT32, rows=order.token_ids),
        _PLACES: Parameter(shape=(spec.vocab_size,), format=FLOAT32, rows=order.token_places),
        _MAY_DRAFT: Parameter(shape=(clusters, size), format=FLOAT32, rows=order.may_draft),
    }
    if not row_scales:
        return parameters | {_TABLE: Parameter(shape=shape, format=FLOAT32, rows=table)}
    # int8 whatever the recipe: the kernels that multiply gathered rows as they are exist for int8 alone.
    return parameters | {
        _TABLE: Parameter(shape=shape, format=INT8, rows=table_int8, unit_scale=True),
        _ROW_SCALES: Parameter(shape=(clusters, size), format=FLOAT32, rows=scales),
    }
