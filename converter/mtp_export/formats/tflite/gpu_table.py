"""What a GPU backend takes of a TFLite graph, said without a GPU: operators by form, and a table of forms that ran.

A form is what a delegate decides by: the operator, of each tensor its type, rank and which axes have size 1, whether it
is constant and how it is quantised, and the options. `tools/gpu_check` cuts one operator of each form out of real
graphs, runs it on the real backend and writes the table.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from mtp_export.formats.roles import ROLES
from mtp_runtime.bundle.bundle import Bundle
from mtp_runtime.errors import BundleError, UserError

# The embedders' tables stay on the CPU: a token reads one row of each.
_OPERATORS = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
_TYPES = {value: name.lower() for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
# Options that say nothing about what is computed, or are repeated by a tensor; and the version of a composite, of which
# there is one.
_IDLE_OPTIONS = frozenset(
    ("newShape", "potScaleInt16", "quantSpec", "quantizedBiasType", "decompositionSubgraphIndex", "version")
)
COMPOSITE = "STABLEHLO_COMPOSITE"
# Operators whose constant integer input says along which axes they work.
_BY_AXES = frozenset(("MEAN", "REDUCE_MAX", "REDUCE_MIN", "SUM", "TRANSPOSE", "ARG_MAX"))

_GPU_ROLES = [role.name for role in ROLES.values() if role.on_gpu]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator at its place. `index` is its number in the subgraph `subgraph` of the model."""

    subgraph: int
    index: int
    name: str
    form: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """Operators of one form that a backend does not take, or that nobody tried. `signatures` counts them."""

    form: str
    reason: str
    signatures: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DelegateTable:
    """The forms that were run on a backend: None for those it takes, else why not."""

    backend: str
    learnt: Mapping[str, Any]
    reasons: Mapping[str, str | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """A TFLite file: its tables in flatbuffers' object form, and the bytes that hold its constants."""

    model: Any
    content: bytes | mmap.mmap

    def constant(self, tensor: Any) -> bytes | None:
        """The data of a tensor, within the flatbuffer or behind it; None where it has none of its own."""
        buffer = self.model.buffers[tensor.buffer]
        if buffer.offset:
            return self.content[buffer.offset : buffer.offset + buffer.size]
        return None if buffer.data is None or not len(buffer.data) else bytes(buffer.data)

    def is_constant(self, tensor: Any) -> bool:
        """Whether a tensor has data of its own, or can have none: the shape of a number without axes is empty."""
        buffer = self.model.buffers[tensor.buffer]
        empty = tensor.shape is not None and 0 in tensor.shape
        return bool(empty or buffer.offset or (buffer.data is not None and len(buffer.data)))

    def operators(self) -> Iterator[Operator]:
        """Every operator, in order; a composite is one, and its parts none."""
        parts = set(self.parts().values())
        for number, subgraph in enumerate(self.model.subgraphs):
            if number in parts:
                continue
            for index, operator in enumerate(subgraph.operators):
                name = self.name_of(operator)
                yield Operator(subgraph=number, index=index, name=name, form=self._form(name, subgraph, operator))

    def parts(self) -> dict[tuple[int, int], int]:
        """The subgraph with the parts of each composite, by the composite's subgraph and place in it.

        Raises:
            BundleError: a composite has none, or those of a signature.
        """
        called = {entry.subgraphIndex for entry in self.model.signatureDefs or ()}
        parts = {}
        for number, subgraph in enumerate(self.model.subgraphs):
            for index, operator in enumerate(subgraph.operators):
                if self.name_of(operator) != COMPOSITE:
                    continue
                options = operator.builtinOptions2
                if not isinstance(options, schema.StableHLOCompositeOptionsT) or options.name is None:
                    raise BundleError("a composite has no name: the model is damaged, export it again")
                part = options.decompositionSubgraphIndex
                if part in called or not 0 <= part < len(self.model.subgraphs):
                    raise BundleError(
                        f"a composite's parts are no subgraph ({part}): the model is damaged, export it again"
                    )
                parts[number, index] = part
        return parts

    def name_of(self, operator: Any) -> str:
        """TFLite's name of an operator."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        return str(_OPERATORS.get(max(code.builtinCode, code.deprecatedBuiltinCode), "UNKNOWN"))

    def signature_names(self) -> Sequence[str]:
        """The name of every subgraph's signature; its number where it has none."""
        names = {entry.subgraphIndex: entry.signatureKey.decode() for entry in self.model.signatureDefs or ()}
        return [names.get(i, str(i)) for i in range(len(self.model.subgraphs))]

    def _form(self, name: str, subgraph: Any, operator: Any) -> str:
        inputs = ", ".join(self._tensor(subgraph, int(i), values=name in _BY_AXES) for i in operator.inputs)
        outputs = ", ".join(self._tensor(subgraph, int(i), values=False) for i in operator.outputs)
        options = " ".join(f"{key}={value}" for key, value in _options(operator))
        if name == COMPOSITE:
            # Written out: the name of a stranger's model may hold what a terminal obeys.
            name += f" {ascii(operator.builtinOptions2.name.decode(errors='replace'))[1:-1]}"
        return f"{name}({inputs}) -> {outputs}" + (f" {{{options}}}" if options else "")

    def _tensor(self, subgraph: Any, index: int, *, values: bool) -> str:
        if index < 0:
            return "none"
        tensor = subgraph.tensors[index]
        shape = [] if tensor.shape is None else [int(n) for n in tensor.shape]
        text = f"{_TYPES[tensor.type]}[{','.join(str(n) if n < 2 else 'n' for n in shape)}]{_quantised(tensor)}"
        if not self.is_constant(tensor):
            return text
        data = self.constant(tensor)
        if values and tensor.type == schema.TensorType.INT32 and data is not None:
            return f"const {[value for (value,) in struct.iter_unpack('<i', data)]}"
        return f"const {text}"


def open_graph(path: Path) -> Graph:
    """A TFLite file, mapped into memory.

    Raises:
        BundleError: it is none, or damaged.
    """
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise BundleError(f"cannot read {path}: {error}") from error
    return read_graph(content, path.name)


def read_graph(content: bytes | mmap.mmap, name: str) -> Graph:
    """The graph of a TFLite file's contents; `name` names it in errors.

    Raises:
        BundleError: it is none, or damaged.
    """
    if content[4:8] != b"TFL3":
        raise BundleError(f"{name} is no TFLite model: give a bundle that mtp-export wrote")
    try:
        return Graph(model=schema.ModelT.InitFromObj(schema.Model.GetRootAs(content)), content=content)
    except (struct.error, IndexError, ValueError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        # What the generated flatbuffer reader raises when offsets lead nowhere.
        raise BundleError(f"{name} is a damaged TFLite model ({type(error).__name__}): export it again") from error


def _options(operator: Any) -> list[tuple[str, object]]:
    values: dict[str, object] = {}
    for options in (operator.builtinOptions, operator.builtinOptions2):
        if options is not None:
            values |= {k: v for k, v in vars(options).items() if isinstance(v, (bool, int, float)) and v}
    return sorted((k, v) for k, v in values.items() if k not in _IDLE_OPTIONS)


def _quantised(tensor: Any) -> str:
    quantisation = tensor.quantization
    if quantisation is None:
        return ""
    if quantisation.details is not None:
        return " blocks"
    if quantisation.scale is None or len(quantisation.scale) == 0:
        return ""
    return " rows" if len(quantisation.scale) > 1 else " one scale"


def delegate_table(backend: str) -> DelegateTable:
    """What was learnt about a backend, as the package carries it."""
    stored = json.loads(files(__package__).joinpath(f"{backend}_table.json").read_text(encoding="utf-8"))
    return DelegateTable(
        backend=backend,
        learnt={key: stored[key] for key in ("machine", "versions", "commit")} | {"forms": len(stored["forms"])},
        reasons={row["form"]: None if row["delegated"] else row["reason"] for row in stored["forms"]},
    )


def refusals(graph: Graph, table: DelegateTable) -> list[Refusal]:
    """What a backend would leave to the CPU, or was never asked, by form, in the order of first appearance."""
    names = graph.signature_names()
    counts: dict[str, Counter[str]] = {}
    for operator in graph.operators():
        if table.reasons.get(operator.form, "") is not None:
            counts.setdefault(operator.form, Counter())[names[operator.subgraph]] += 1
    return [
        Refusal(form=form, reason=table.reasons.get(form) or _untried(table), signatures=dict(count))
        for form, count in counts.items()
    ]


def inspect_bundle(path: Path, table: DelegateTable) -> dict[str, list[Refusal]]:
    """What a backend would not take of the graphs that it has to take whole, by role.

    Raises:
        BundleError: the bundle is damaged.
        UserError: it is no TFLite bundle.
    """
    with Bundle.open(path, verify=False) as bundle:
        if bundle.manifest.export_format != "tflite":
            raise UserError(f"{path} is an {bundle.manifest.export_format} bundle: a delegate takes TFLite graphs")
        return {role: refusals(open_graph(bundle.path(role)), table) for role in _GPU_ROLES}


def _untried(table: DelegateTable) -> str:
    return f"never run on the {table.backend}: `python -m tools.gpu_check probe` asks the real backend"
