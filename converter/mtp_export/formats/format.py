"""The seam `Format`: what an export needs of an export format. Each is a package beside this module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mtp_export.config import EXPORT_FORMATS, FormatConfig
from mtp_export.formats.roles import TraceRequest
from mtp_runtime.errors import UserError

if TYPE_CHECKING:
    from mtp_export.graph.ir import TracedGraph
    from mtp_export.weights.parameter import Parameter, Values
    from mtp_export.weights.recipes import WeightFormat
    from mtp_export.weights.stored import StoredWeight
    from mtp_runtime import Bundle


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplyEnds:
    """Token ids: what ends a reply, what ends a call (the same where the template ends none), and the first of what the
    template writes behind a reply."""

    reply: int
    call: int
    behind_reply: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteRequest:
    """What a graph's files are written from: the parameters of all graphs, by role and name, and the folder.

    reply_ends: the tokens that end replies in chats, None where nothing is to be done about them. on_block: is called
    with the number of bytes that were written, and the name of their parameter.
    """

    values: Values
    folder: Path
    reply_ends: ReplyEnds | None
    on_block: Callable[[int, str], None]


class LoweredGraph(Protocol):
    """A converted graph without weights; what else it has is its format's own."""

    @property
    def role(self) -> str: ...


class Format(Protocol):
    """An export format with its variants (`FormatConfig`).

    name: as --format has it. backend: who runs its graphs. container: whether one `.litertlm` holds a whole bundle.
    segment_s: seconds that converting a segment takes one process. mends_reply_ends: whether its target mends what the
    stock runtime feeds for the token that ended a reply.
    """

    name: str
    backend: str
    container: bool
    segment_s: float
    mends_reply_ends: bool

    def trace(self, request: TraceRequest) -> list[TracedGraph]:
        """Trace the graphs of all roles, in the order of `ROLES`."""

    def check(self, name: str, parameter: Parameter) -> None:
        """Check that there is a kernel for a matrix that the checkpoint stores as integers.

        Raises:
            CheckpointError: there is none.
        """

    def stored_format(self, parameter: Parameter) -> WeightFormat:
        """Return the format that a parameter really has in a file."""

    def stored_bytes(self, values: Mapping[str, Parameter]) -> int:
        """Return the bytes that the parameters of a graph take in its files."""

    def file_sizes(self, graphs: Sequence[TracedGraph], values: Values) -> dict[str, int]:
        """Return the bytes of the graphs' files, by the roles of the files, in the order of the manifest."""

    def file_name(self, role: str) -> str:
        """Return the name of a file by its role, as `file_sizes` has it."""

    def lower(
        self, graphs: Sequence[TracedGraph], workers: int, on_segments: Callable[[int], None]
    ) -> Sequence[LoweredGraph]:
        """Convert graphs in `workers` processes; `on_segments` is called with numbers of segments that are done.

        The result is in the order in which graphs are to be written.

        Raises:
            BackendError: a worker died.
        """

    def write(self, lowered: Any, request: WriteRequest) -> list[Path]:
        """Write a converted graph, which is consumed, with its weights, and return its files."""

    def read_weights(self, bundle: Bundle, role: str) -> dict[str, StoredWeight]:
        """Return the weights that lie in a graph of a finished bundle, by the names of their parameters."""


def format_of(config: FormatConfig) -> Format:
    """Return the export format that a config names.

    Raises:
        UserError: there is none of that name.
    """
    if config.name == "onnx":
        from mtp_export.formats.onnx.format import OnnxFormat

        return OnnxFormat(config)
    if config.name == "tflite":
        from mtp_export.formats.tflite.format import TFLiteFormat

        return TFLiteFormat(config)
    raise UserError(f"the export format is {config.name!r}, expected one of: {', '.join(EXPORT_FORMATS)}")
