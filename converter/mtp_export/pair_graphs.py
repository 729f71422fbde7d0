"""The graphs of a pair: their sizes, what they are traced from, and what their parameters are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from mtp_export.arch.spec import SLIDING, DrafterSpec, TargetSpec
from mtp_export.config import MIN_CACHE_LENGTH, ExportConfig, in_range
from mtp_export.formats.format import Format
from mtp_export.formats.roles import ROLES, TraceRequest
from mtp_export.graph.ir import TracedGraph
from mtp_export.graph.static import GraphShape, Ring
from mtp_export.source import texts
from mtp_export.source.left_aside import left_aside
from mtp_export.source.pair import Pair
from mtp_export.weights import mapping
from mtp_export.weights.parameter import Values
from mtp_export.weights.recipes import RECIPES, with_embedders
from mtp_runtime.bundle.context import FULL_STEP
from mtp_runtime.errors import UserError

_SPARE_BYTES = 64 << 20  # of disk, for text files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A config and its pair, of which no setting is left to be measured."""

    config: ExportConfig
    pair: Pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedPair:
    """The graphs of a pair, and what the parameters of each are made of."""

    settings: Settings
    shape: GraphShape
    graphs: Sequence[TracedGraph]
    values: Values


def trace_pair(settings: Settings, format: Format) -> TracedPair:
    """Trace the graphs of a pair; no weight is read.

    Raises:
        UserError: --cache-length is nothing that the target or its prefill can have.
        CheckpointError: a tensor is missing, unknown, or of another shape or dtype.
    """
    request = trace_request(settings.config, settings.pair)
    graphs = format.trace(request)
    values = pair_parameters(settings.config, settings.pair, graphs, format)
    return TracedPair(settings=settings, shape=request.shape, graphs=graphs, values=values)


def graph_shape(config: ExportConfig, pair: Pair) -> GraphShape:
    """Return the static sizes of a pair's graphs.

    Raises:
        UserError: --cache-length is nothing that the target or its prefill can have.
    """
    sizes, context = pair.model.sizes, contexts(config, pair)
    shortest = max(MIN_CACHE_LENGTH, min(sizes.prefill_lengths) + 1)  # a bundle needs a prefill
    in_range("--cache-length", context.longest, shortest, pair.target_spec.max_position_embeddings)
    cache_length = context.longest
    if config.format.chooses_context:
        # Above whole steps: the reference runtime rounds every context up to them.
        steps = -(-context.longest // FULL_STEP)
        cache_length = prime_above(steps * FULL_STEP, pair.target_spec, pair.drafter_spec)
    drafts = config.graph.num_draft_tokens
    num_draft_tokens = sizes.num_draft_tokens if drafts is None else drafts
    prefill_lengths = tuple(n for n in sizes.prefill_lengths if n < context.longest)
    return GraphShape(
        cache_length=cache_length,
        num_draft_tokens=num_draft_tokens,
        prefill_lengths=prefill_lengths,
        ring=_ring(config, pair, max(*prefill_lengths, num_draft_tokens + 1), context.longest),
        single_buffer=config.format.delegate == "gpu",
        composites=config.format.composites,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contexts:
    """The longest context of a bundle, and that of an application that chooses none."""

    longest: int
    default: int


def contexts(config: ExportConfig, pair: Pair) -> Contexts:
    """Return the contexts of a bundle.

    Raises:
        UserError: --default-context is longer than the longest.
    """
    sizes, most = pair.model.sizes, pair.target_spec.max_position_embeddings
    longest = config.graph.cache_length
    if longest is None:
        longest = min(sizes.longest_context if config.format.chooses_context else sizes.context_length, most)
    default = config.graph.context_length
    if default is None:
        default = min(sizes.context_length, longest)
    elif default > longest:
        raise UserError(f"--default-context is {default}, expected at most the --cache-length of {longest}")
    return Contexts(longest=longest, default=default)


def prime_above(length: int, target: TargetSpec, drafter: DrafterSpec) -> int:
    """Return the smallest prime above `length` that divides no other size of the graphs: LiteRT-LM puts the length
    that an application chooses in place of its multiples."""
    head = drafter.head
    other = {target.vocab_size_per_layer_input, target.num_layers * target.per_layer_size}
    other |= {head.num_candidates, head.cluster_size * drafter.hidden_size, head.num_centroids}
    for spec in (target, drafter):
        other |= {spec.vocab_size, spec.hidden_size}
        other |= {n for layer in spec.layers for n in (layer.intermediate_size, spec.num_heads * layer.head_dim)}
    other.add(drafter.visible(drafter.kinds[SLIDING]) or 0)  # slots that it gathers; the target's are multiples of 64
    candidate = length + 1
    while any(candidate % n == 0 for n in range(2, math.isqrt(candidate) + 1)) or any(
        n % candidate == 0 for n in other
    ):
        candidate += 1
    return candidate


def _ring(config: ExportConfig, pair: Pair, longest_pass: int, longest_context: int) -> Ring | None:
    """Return the ring of a bundle whose context is chosen at load; None where a ring would never be full.

    Raises:
        UserError: --rings is too short for the window and a pass, or no power of two, or nothing ends an answer.
    """
    requested, ends = config.graph.ring_length, pair.stop_token_ids
    if not config.format.chooses_context or requested == 0:
        return None
    if not ends:
        if requested is None:
            return None
        raise UserError("--rings needs a token that ends an answer, and the checkpoint names none: give --rings off")
    length = pair.model.sizes.ring_length if requested is None else requested
    spec = pair.target_spec
    shortest = (spec.visible(spec.kinds[SLIDING]) or 0) + longest_pass
    if length < shortest or length & (length - 1):
        raise UserError(
            f"--rings is {length}, expected off or a power of two of at least {shortest}, the window of sliding layers "
            "and the longest pass"
        )
    return Ring(length=length, end_token=ends[0]) if length < longest_context else None


def trace_request(config: ExportConfig, pair: Pair) -> TraceRequest:
    """Return what the graphs of a pair are traced from.

    Raises:
        UserError: as `graph_shape` does.
    """
    return TraceRequest(
        config=pair.target.config,
        target=pair.target_spec.of_graphs,
        drafter=pair.drafter_spec,
        shape=graph_shape(config, pair),
        position_offset=config.graph.drafter_position_offset,
        row_scales=config.quantisation.drafter != "f32",
    )


def pair_parameters(config: ExportConfig, pair: Pair, graphs: Sequence[TracedGraph], format: Format) -> Values:
    """Return what the parameters of each graph are made of; nothing is read yet.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or dtype.
    """
    of_target, (drafter,) = _by_part(graphs)
    target_recipe = with_embedders(RECIPES[config.quantisation.recipe], RECIPES[config.quantisation.embedders])
    of_roles = mapping.target_parameters(pair.target, of_target, target_recipe)
    for part in of_roles.values():
        for name, parameter in part.items():
            if parameter.stored:
                format.check(name, parameter)
    # LiteRT-LM forgets a stop token that was drafted and accepted, so none is drafted (docs/litert-lm.md).
    never_drafted = pair.stop_token_ids if format.container else ()
    drafter_recipe = RECIPES[config.quantisation.drafter]
    of_drafter = mapping.drafter_parameters(pair.drafter, drafter, pair.drafter_spec, drafter_recipe, never_drafted)
    return of_roles | {drafter.role: of_drafter}


def room_bytes(format: Format, graph_bytes: int) -> int:
    """Return the bytes of disk that a bundle takes whose graphs have `graph_bytes`. With a container they lie there
    twice: as plain files, and within it."""
    return graph_bytes * (2 if format.container else 1) + _SPARE_BYTES


def _by_part(graphs: Sequence[TracedGraph]) -> tuple[list[TracedGraph], list[TracedGraph]]:
    """Return the graphs whose parameters come from the target's checkpoint, and those of the drafter's."""
    parts = ("target", "drafter")
    of_target, of_drafter = ([graph for graph in graphs if ROLES[graph.role].part == part] for part in parts)
    return of_target, of_drafter


def pair_left_aside(pair: Pair, graphs: Sequence[TracedGraph], *, reads_weights: bool = True) -> tuple[str, ...]:
    """Return what is not exported of a pair's checkpoints, because it changes nothing of what is, in short phrases."""
    of_target, (drafter,) = _by_part(graphs)
    drafter_tensors = mapping.drafter_tensors(drafter, pair.drafter_spec)
    of_drafter = left_aside(pair.drafter, drafter_tensors, reads_weights=reads_weights)
    return (
        *left_aside(pair.target, mapping.target_tensors(of_target), reads_weights=reads_weights),
        *pair.target.left_aside,
        *texts.left_aside(pair.target, pair.target_spec),
        *(f"of the drafter: {phrase}" for phrase in of_drafter),
    )
