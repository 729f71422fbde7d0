"""TFLite as a `Format`: one file a graph, and all of them in a `.litertlm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mtp_export.config import FormatConfig
from mtp_export.formats.format import WriteRequest
from mtp_export.formats.roles import ROLES, TraceRequest
from mtp_export.formats.tflite import chain, sizes
from mtp_export.formats.tflite.passes.caches_first import with_caches_first
from mtp_export.formats.tflite.passes.reply_ends import with_reply_ends
from mtp_export.formats.tflite.passes.squares import with_squares_reshaped_first
from mtp_export.formats.tflite.read import read_weights
from mtp_export.formats.tflite.rewriting import without_unused
from mtp_export.formats.tflite.write import write_graph
from mtp_export.graph.ir import TracedGraph
from mtp_export.source.stored_integers import check_runs
from mtp_export.weights.parameter import Parameter, Values
from mtp_export.weights.recipes import WeightFormat
from mtp_export.weights.stored import StoredWeight
from mtp_runtime import Bundle

_TABLES = [role.name for role in ROLES.values() if role.looks_up]


class TFLiteFormat:
    """TFLite for LiteRT and LiteRT-LM, for a CPU or a GPU."""

    name, backend, container, segment_s = "tflite", "LiteRT", True, 1.0

    def __init__(self, config: FormatConfig) -> None:
        self._for_gpu = config.delegate == "gpu"
        self.mends_reply_ends = not self._for_gpu  # LiteRT-LM's CPU backend needs it

    def trace(self, request: TraceRequest) -> list[TracedGraph]:
        return [role.static(request) for role in ROLES.values() if role.is_in(request)]

    def check(self, name: str, parameter: Parameter) -> None:
        check_runs(name, parameter.format, self.name, looked_up=parameter.looked_up)

    def stored_format(self, parameter: Parameter) -> WeightFormat:
        return parameter.format

    def stored_bytes(self, values: Mapping[str, Parameter]) -> int:
        return sum(sizes.data_bytes(parameter) for parameter in values.values())

    def file_sizes(self, graphs: Sequence[TracedGraph], values: Values) -> dict[str, int]:
        return {graph.role: sizes.graph_bytes(graph, values[graph.role]) for graph in graphs}

    def file_name(self, role: str) -> str:
        return f"{role}.tflite"

    def lower(
        self, graphs: Sequence[TracedGraph], workers: int, on_segments: Callable[[int], None]
    ) -> list[chain.LoweredGraph]:
        lowered = [self._rewritten(graph) for graph in chain.lower(graphs, workers, on_segments)]
        return sorted(lowered, key=lambda graph: graph.role == "target")  # it needs rows of the embedders

    def _rewritten(self, graph: chain.LoweredGraph) -> chain.LoweredGraph:
        """Return a converted graph with the operators that its backend wants."""
        if self._for_gpu:
            return without_unused(graph)
        return with_caches_first(with_squares_reshaped_first(graph))

    def write(self, lowered: chain.LoweredGraph, request: WriteRequest) -> list[Path]:
        path = request.folder / self.file_name(lowered.role)
        mended = self._with_reply_ends(lowered, request) if lowered.role == "target" else lowered
        write_graph(mended, request.values[lowered.role], path, request.on_block)
        return [path]

    def _with_reply_ends(self, target: chain.LoweredGraph, request: WriteRequest) -> chain.LoweredGraph:
        """Return a target that mends what LiteRT-LM's CPU backend feeds for the token that ended a reply."""
        if request.reply_ends is None:
            return target
        tables = [request.folder / self.file_name(role) for role in _TABLES]
        return with_reply_ends(target, request.reply_ends, tables)

    def read_weights(self, bundle: Bundle, role: str) -> dict[str, StoredWeight]:
        return read_weights(bundle.path(role))
