"""TracedGraph → LoweredGraph for LiteRT: segments are converted in worker processes, then chained.

`_Chain` copies converted segments call by call into one subgraph a signature. The result has no weights yet: every
parameter is one tensor a signature without data.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from mtp_export.formats.segment_cache import cached_results
from mtp_export.graph.ir import Segment, TracedGraph, TracedSignature
from mtp_runtime.bundle.contract import TensorSpec

_BATCH = 6  # segments converted at a time: enough to share the fixed cost, few enough to show progress
_TYPES = {"float32": schema.TensorType.FLOAT32, "int32": schema.TensorType.INT32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoweredGraph:
    """A TFLite model in flatbuffers' object form, and the tensors of each parameter in it.

    weights: parameter → (subgraph index, tensor index), one for each signature that uses it.
    """

    role: str
    model: schema.ModelT
    weights: Mapping[str, Sequence[tuple[int, int]]]


def lower(
    graphs: Sequence[TracedGraph], workers: int, on_segments: Callable[[int], None] = lambda count: None
) -> list[LoweredGraph]:
    """Convert graphs, their segments spread over `workers` processes; `on_segments` is told how many are done.

    Raises:
        BackendError: a worker died, most likely killed for its memory.
    """
    names = [(number, key) for number, graph in enumerate(graphs) for key in graph.segments]
    # Dealt out like cards: neighbours are alike, so every batch is about as large.
    count = max(1, min(len(names) // _BATCH, len(names)))
    batches = [names[start::count] for start in range(count)]
    work = [[graphs[number].segments[key] for number, key in batch] for batch in batches]
    templates: dict[tuple[int, str], _Template] = {}
    with contextlib.closing(cached_results(_convert, work, workers)) as converted:
        for batch, content in zip(batches, converted, strict=True):
            templates.update(zip(batch, _split(content, len(batch)), strict=True))
            on_segments(len(batch))
    return [
        _Chain(graph, {key: templates[number, key] for key in graph.segments}).lowered()
        for number, graph in enumerate(graphs)
    ]


def _convert(segments: Sequence[Segment]) -> bytes:
    from mtp_export.formats.tflite.convert import convert

    return convert(segments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Template:
    """A converted segment: its operators in order, and its tensors by name in the subgraph that it shares."""

    model: schema.ModelT
    subgraph: schema.SubGraphT
    operators: Sequence[schema.OperatorT]
    inputs: Mapping[str, int]
    weights: Mapping[str, int]
    outputs: Mapping[str, int]


def _split(content: bytes, count: int) -> list[_Template]:
    """Take a model of segments side by side apart."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content))
    entry = model.signatureDefs[0]
    subgraph = model.subgraphs[entry.subgraphIndex]
    inputs: list[dict[str, int]] = [{} for _ in range(count)]
    outputs: list[dict[str, int]] = [{} for _ in range(count)]
    for items, tensors in ((entry.inputs, inputs), (entry.outputs, outputs)):
        for item in items:
            scope, _, name = item.name.decode().removeprefix("x_").partition(".")
            tensors[int(scope.removeprefix("s"))][name] = item.tensorIndex
    return [
        _Template(
            model=model,
            subgraph=subgraph,
            operators=leading_to(subgraph, outputs[i].values()),
            inputs={name: index for name, index in inputs[i].items() if not name.startswith("w.")},
            weights={name.removeprefix("w."): index for name, index in inputs[i].items() if name.startswith("w.")},
            outputs=outputs[i],
        )
        for i in range(count)
    ]


def leading_to(subgraph: schema.SubGraphT, tensors: Iterable[int]) -> list[schema.OperatorT]:
    """The operators that tensors depend on, in their order."""
    needed, chosen = set(tensors), []
    for operator in reversed(subgraph.operators):
        if needed & {int(i) for i in operator.outputs}:
            needed |= {int(i) for i in operator.inputs}
            chosen.append(operator)
    return chosen[::-1]


class _Chain:
    """Copies converted segments, call by call, into one subgraph a signature."""

    def __init__(self, graph: TracedGraph, templates: Mapping[str, _Template]) -> None:
        self.graph, self.templates = graph, templates
        self.model = schema.ModelT()
        self.model.version, self.model.description = 3, b"mtp-export"
        empty = schema.BufferT()
        self.model.buffers, self.model.operatorCodes = [empty], []
        self.model.subgraphs, self.model.signatureDefs, self.model.metadata = [], [], []
        self.weights: dict[str, list[tuple[int, int]]] = {}
        self._codes: dict[tuple[int, int, bytes], int] = {}
        self._buffers: dict[bytes, int] = {}
        self._parts: dict[bytes, schema.SubGraphT] = {}

    def lowered(self) -> LoweredGraph:
        for traced in self.graph.signatures:
            self._add_signature(traced)
        self.model.subgraphs += self._parts.values()
        return LoweredGraph(role=self.graph.role, model=self.model, weights=self.weights)

    def _add_signature(self, traced: TracedSignature) -> None:
        subgraph = schema.SubGraphT()
        subgraph.name = traced.signature.name.encode()
        subgraph.tensors, subgraph.operators = [], []
        values = {spec.name: self._tensor(subgraph, spec) for spec in traced.signature.inputs}
        parameters: dict[str, int] = {}
        for number, call in enumerate(traced.calls):
            template = self.templates[call.segment]
            mapped = {-1: -1} | {index: values[call.inputs[name]] for name, index in template.inputs.items()}
            for leaf, index in template.weights.items():
                parameter = call.weights[leaf]
                if parameter not in parameters:
                    copy = self._copy_tensor(subgraph, template, index, parameter)
                    parameters[parameter] = copy
                    self.weights.setdefault(parameter, []).append((len(self.model.subgraphs), copy))
                mapped[index] = parameters[parameter]
            self._copy_operators(subgraph, template, mapped, f"{number}.{call.segment}")
            values.update({call.outputs[name]: mapped[index] for name, index in template.outputs.items()})
        self._finish(subgraph, traced, values)

    def _finish(self, subgraph: schema.SubGraphT, traced: TracedSignature, values: Mapping[str, int]) -> None:
        signature = traced.signature
        entry = schema.SignatureDefT()
        entry.signatureKey, entry.subgraphIndex = signature.name.encode(), len(self.model.subgraphs)
        entry.inputs = [_tensor_map(spec.name, values[spec.name]) for spec in signature.inputs]
        produced = [(spec.name, values[traced.outputs[spec.name]]) for spec in signature.outputs]
        entry.outputs = [_tensor_map(name, index) for name, index in produced]
        subgraph.inputs = np.array([m.tensorIndex for m in entry.inputs], np.int32)
        subgraph.outputs = np.array([m.tensorIndex for m in entry.outputs], np.int32)
        self.model.subgraphs.append(subgraph)
        self.model.signatureDefs.append(entry)

    def _tensor(self, subgraph: schema.SubGraphT, spec: TensorSpec) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.type = f"{spec.name}".encode(), _TYPES[spec.dtype]
        tensor.shape, tensor.hasRank, tensor.buffer = np.array(spec.shape, np.int32), True, 0
        subgraph.tensors.append(tensor)
        return len(subgraph.tensors) - 1

    def _copy_tensor(self, subgraph: schema.SubGraphT, template: _Template, index: int, name: str) -> int:
        old = template.subgraph.tensors[index]
        new = schema.TensorT()
        new.name, new.type, new.shape, new.hasRank = name.encode(), old.type, old.shape, True
        new.shapeSignature = old.shapeSignature
        new.buffer = self._buffer(template.model.buffers[old.buffer].data)
        subgraph.tensors.append(new)
        return len(subgraph.tensors) - 1

    def _buffer(self, data: Any) -> int:
        """Index of a buffer with these bytes; equal constants of all segments are one buffer."""
        if data is None or len(data) == 0:
            return 0
        key = np.asarray(data, np.uint8).tobytes()
        if key not in self._buffers:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(key, np.uint8)
            self.model.buffers.append(buffer)
            self._buffers[key] = len(self.model.buffers) - 1
        return self._buffers[key]

    def _copy_operators(
        self, subgraph: schema.SubGraphT, template: _Template, mapped: dict[int, int], scope: str
    ) -> None:
        """Copy the operators of a segment; `mapped` takes its tensors to ours and is completed on the way."""
        inherited = len(mapped)

        def ours(index: int) -> int:
            if index not in mapped:
                # Counted here: the converter's own numbers depend on what else was in the batch.
                mapped[index] = self._copy_tensor(subgraph, template, index, f"{scope}/{len(mapped) - inherited}")
            return mapped[index]

        for old in template.operators:
            new = schema.OperatorT()
            new.__dict__.update(old.__dict__)
            new.opcodeIndex = self._code(template.model.operatorCodes[old.opcodeIndex])
            new.inputs = np.array([ours(int(i)) for i in old.inputs], np.int32)
            new.outputs = np.array([ours(int(i)) for i in old.outputs], np.int32)
            if isinstance(old.builtinOptions2, schema.StableHLOCompositeOptionsT):
                new.builtinOptions2 = self._copy_composite(template, old.builtinOptions2)
            subgraph.operators.append(new)

    def _copy_composite(
        self, template: _Template, old: schema.StableHLOCompositeOptionsT
    ) -> schema.StableHLOCompositeOptionsT:
        """Copy a composite's options and, unless an equal one was copied, the subgraph with its parts."""
        source = template.model.subgraphs[old.decompositionSubgraphIndex]
        subgraph = schema.SubGraphT()
        subgraph.name, subgraph.tensors, subgraph.operators = old.name + b".parts", [], []
        parts = dataclasses.replace(template, subgraph=source, operators=source.operators)
        mapped = {-1: -1}
        for number, index in enumerate(int(i) for i in source.inputs):
            mapped[index] = self._copy_tensor(subgraph, parts, index, f"input/{number}")
        self._copy_operators(subgraph, parts, mapped, "parts")
        subgraph.inputs, subgraph.outputs = (
            np.array([mapped[int(i)] for i in places], np.int32) for places in (source.inputs, source.outputs)
        )
        builder = flatbuffers.Builder()
        builder.Finish(subgraph.Pack(builder))
        key = bytes(builder.Output())
        self._parts.setdefault(key, subgraph)
        new = copy.copy(old)
        # They follow the signatures' subgraphs, in the order in which they were first needed.
        new.decompositionSubgraphIndex = len(self.graph.signatures) + list(self._parts).index(key)
        return new

    def _code(self, code: schema.OperatorCodeT) -> int:
        """Return the place of an operator code; custom operators are told apart by their names too."""
        name = bytes(code.customCode or b"") if code.builtinCode == schema.BuiltinOperator.CUSTOM else b""
        key = (code.builtinCode, code.version, name)
        if key not in self._codes:
            self._codes[key] = len(self.model.operatorCodes)
            self.model.operatorCodes.append(code)
        return self._codes[key]


def _tensor_map(name: str, index: int) -> schema.TensorMapT:
    item = schema.TensorMapT()
    item.name, item.tensorIndex = name.encode(), index
    return item
