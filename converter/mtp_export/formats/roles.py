"""The graphs of a bundle, a row for each: a new graph, such as an encoder, is a row here and no branch elsewhere.

The functions import what traces when they are called, so that reading the table costs no import of torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from mtp_export.arch.spec import DrafterSpec, TargetSpec

if TYPE_CHECKING:
    from mtp_export.graph.ir import TracedGraph
    from mtp_export.graph.static import GraphShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """What graphs are traced from. `row_scales`: the clustered head multiplies int8 rows by their scales. `config`: the
    target's config.json, for graphs with a spec of their own, such as towers."""

    config: Mapping[str, Any]
    target: TargetSpec
    drafter: DrafterSpec
    shape: GraphShape
    position_offset: int
    row_scales: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphRole:
    """A graph by its role.

    part: whose checkpoint its parameters come from. looks_up: its matrices are tables of which rows are read, and none
    is multiplied. section: its kind of model in a `.litertlm`. on_gpu: a GPU runs it where a bundle is for one. static
    and dynamic: how it is traced, with fixed numbers of tokens or with any. is_in: whether a pair has this graph.
    """

    name: str
    part: Literal["target", "drafter"]
    looks_up: bool
    section: str
    on_gpu: bool
    static: Callable[[TraceRequest], TracedGraph]
    dynamic: Callable[[TraceRequest], TracedGraph]
    is_in: Callable[[TraceRequest], bool] = lambda request: True


def _static_target(request: TraceRequest) -> TracedGraph:
    from mtp_export.graph.static import trace_target

    return trace_target(request.target, request.shape)


def _dynamic_target(request: TraceRequest) -> TracedGraph:
    from mtp_export.graph.dynamic import trace_target

    return trace_target(request.target)


def _static_drafter(request: TraceRequest) -> TracedGraph:
    from mtp_export.graph.static import trace_drafter

    return trace_drafter(
        request.drafter,
        request.target,
        request.shape,
        position_offset=request.position_offset,
        row_scales=request.row_scales,
    )


def _dynamic_drafter(request: TraceRequest) -> TracedGraph:
    from mtp_export.graph.dynamic import trace_drafter

    return trace_drafter(
        request.drafter, request.target, position_offset=request.position_offset, quantised_head=request.row_scales
    )


def _embedder(name: str, *, section: str) -> GraphRole:
    """Return the role of a table of the target that looks rows up, which takes no GPU."""

    def static(request: TraceRequest) -> TracedGraph:
        from mtp_export.graph.static import trace_embedder

        return trace_embedder(request.target, name)

    def dynamic(request: TraceRequest) -> TracedGraph:
        from mtp_export.graph.dynamic import trace_embedder

        return trace_embedder(request.target, name)

    return GraphRole(
        name=name, part="target", looks_up=True, section=section, on_gpu=False, static=static, dynamic=dynamic
    )


# In the order in which they are traced, converted and listed.
ROLES = {
    role.name: role
    for role in (
        GraphRole(
            name="target",
            part="target",
            looks_up=False,
            section="PREFILL_DECODE",
            on_gpu=True,
            static=_static_target,
            dynamic=_dynamic_target,
        ),
        _embedder("embedder", section="EMBEDDER"),
        _embedder("per_layer_embedder", section="PER_LAYER_EMBEDDER"),
        GraphRole(
            name="drafter",
            part="drafter",
            looks_up=False,
            section="MTP_DRAFTER",
            on_gpu=True,
            static=_static_drafter,
            dynamic=_dynamic_drafter,
        ),
    )
}
