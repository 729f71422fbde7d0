"""ONNX as a `Format`: a graph and its data a role, and further graphs for several sequences over the same data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mtp_export.config import FormatConfig
from mtp_export.formats.format import WriteRequest
from mtp_export.formats.onnx import convert, sizes
from mtp_export.formats.onnx.batch import write_batched
from mtp_export.formats.onnx.read import read_weights
from mtp_export.formats.onnx.write import block_size, write_onnx
from mtp_export.formats.roles import ROLES, TraceRequest
from mtp_export.formats.sizes import padded
from mtp_export.graph.ir import TracedGraph
from mtp_export.source.stored_integers import check_runs
from mtp_export.weights.parameter import Parameter, Values
from mtp_export.weights.recipes import FLOAT32, WeightFormat
from mtp_export.weights.stored import StoredWeight
from mtp_runtime import Bundle
from mtp_runtime.bundle.contract import BATCH_ROLES, GraphSignature, batch_role

_OF_BATCH = {batch_role(role): role for role in BATCH_ROLES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lowered:
    """A converted graph and its signature, which the graph for several sequences is made from."""

    role: str
    graph: convert.LoweredGraph
    signature: GraphSignature


class OnnxFormat:
    """ONNX for ONNX Runtime, with its own attention or in standard operations."""

    name, backend, container, segment_s, mends_reply_ends = "onnx", "ONNX Runtime", False, 2.1, False

    def __init__(self, config: FormatConfig) -> None:
        self._config = config

    def trace(self, request: TraceRequest) -> list[TracedGraph]:
        return [role.dynamic(request) for role in ROLES.values() if role.is_in(request)]

    def check(self, name: str, parameter: Parameter) -> None:
        check_runs(name, parameter.format, self.name, looked_up=parameter.looked_up)

    def stored_format(self, parameter: Parameter) -> WeightFormat:
        if parameter.format.bits == FLOAT32.bits or parameter.unit_scale:
            return parameter.format
        return dataclasses.replace(parameter.format, block_size=block_size(parameter))

    def stored_bytes(self, values: Mapping[str, Parameter]) -> int:
        return sum(sizes.data_bytes(parameter) for parameter in values.values())

    def file_sizes(self, graphs: Sequence[TracedGraph], values: Values) -> dict[str, int]:
        of_files: dict[str, int] = {}
        for graph in graphs:
            part = values[graph.role]
            of_files[graph.role] = sizes.graph_bytes(graph, part, portable=self._config.portable)
            of_files[f"{graph.role}_data"] = sum(padded(sizes.data_bytes(parameter)) for parameter in part.values())
        for graph in graphs:
            if self._is_batched(graph.role):
                more = sizes.more_batch_bytes(graph, self._config.batch_size)
                of_files[batch_role(graph.role)] = of_files[graph.role] + more
        return of_files

    def file_name(self, role: str) -> str:
        if role in _OF_BATCH:
            return f"{_OF_BATCH[role]}.batch.onnx"
        return f"{role.removesuffix('_data')}.onnx.data" if role.endswith("_data") else f"{role}.onnx"

    def _is_batched(self, role: str) -> bool:
        return self._config.batch_size > 1 and role in BATCH_ROLES

    def lower(self, graphs: Sequence[TracedGraph], workers: int, on_segments: Callable[[int], None]) -> list[_Lowered]:
        lowered = convert.lower(graphs, workers, portable=self._config.portable, on_segments=on_segments)
        return [
            _Lowered(role=traced.role, graph=graph, signature=traced.signatures[0].signature)
            for traced, graph in zip(graphs, lowered, strict=True)
        ]

    def write(self, lowered: _Lowered, request: WriteRequest) -> list[Path]:
        role = lowered.role
        path, data = (request.folder / self.file_name(name) for name in (role, f"{role}_data"))
        write_onnx(lowered.graph, request.values[role], path, request.on_block)
        if not self._is_batched(role):
            return [path, data]
        batched = request.folder / self.file_name(batch_role(role))
        write_batched(path, lowered.signature, self._config.batch_size, batched)
        return [path, data, batched]

    def read_weights(self, bundle: Bundle, role: str) -> dict[str, StoredWeight]:
        return read_weights(bundle.path(role))
