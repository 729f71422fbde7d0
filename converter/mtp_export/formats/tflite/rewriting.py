"""Operators of a converted graph exchanged for others: what every such rewriting needs."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from mtp_export.formats.tflite.chain import LoweredGraph, leading_to

CODES = schema.BuiltinOperator
_TYPES = {np.dtype(np.float32): schema.TensorType.FLOAT32, np.dtype(np.int32): schema.TensorType.INT32}


def rewrite(lowered: LoweredGraph, rewriting: Callable[[Any, Any, Shared], Rewriting]) -> LoweredGraph:
    """Rewrite every signature of a graph, in place, and take out what is not used then. The result is the graph with
    the places that its parameters have then."""
    shared = Shared()
    for entry in lowered.model.signatureDefs:
        rewriting(lowered.model, entry, shared).run()
    return without_unused(lowered)


def without_unused(lowered: LoweredGraph) -> LoweredGraph:
    """Take from the signatures of a graph, in place, the operators and tensors that lead to none of their outputs. The
    result is the graph with the places that its parameters have then."""
    weights = [place for places in lowered.weights.values() for place in places]
    kept = {}
    for entry in lowered.model.signatureDefs:
        number = entry.subgraphIndex
        kept[number] = _used(lowered.model, number, {index for s, index in weights if s == number})
    moved = {name: [(s, kept[s][index]) for s, index in places] for name, places in lowered.weights.items()}
    return dataclasses.replace(lowered, weights=moved)


@dataclasses.dataclass(frozen=True)
class Shared:
    """What is in a model once: constants."""

    buffers: dict[tuple[str, bytes], int] = dataclasses.field(default_factory=dict)


class Rewriting(abc.ABC):
    """One signature's subgraph while it is rewritten. `makers` and `users` are those from before."""

    def __init__(self, model: Any, entry: Any, shared: Shared) -> None:
        self.model, self.entry, self.shared = model, entry, shared
        self.subgraph = model.subgraphs[entry.subgraphIndex]
        self.makers = {int(i): operator for operator in self.subgraph.operators for i in operator.outputs}
        self.users: dict[int, list[Any]] = {int(i): [None] for i in self.subgraph.outputs}
        for operator in self.subgraph.operators:
            for i in operator.inputs:
                self.users.setdefault(int(i), []).append(operator)

    @abc.abstractmethod
    def run(self) -> None:
        """Rewrite the subgraph."""

    def code(self, operator: Any) -> int:
        """TFLite's number of an operator's kind."""
        return int(self.model.operatorCodes[operator.opcodeIndex].builtinCode)

    def maker(self, tensor: Any, code: int) -> Any:
        """The operator that makes a tensor, None where it is of another kind."""
        operator = self.makers.get(int(tensor))
        return operator if operator is not None and self.code(operator) == code else None

    def users_of(self, tensor: Any) -> list[Any]:
        """The operators that a tensor is an input of; None stands for the subgraph's caller."""
        return self.users.get(int(tensor), [])

    def place(self, operator: Any) -> int:
        """Number of an operator in the subgraph."""
        return next(i for i, other in enumerate(self.subgraph.operators) if other is operator)

    def shape(self, tensor: Any) -> list[int]:
        """A tensor's shape."""
        return [int(n) for n in self.subgraph.tensors[int(tensor)].shape]

    def values(self, tensor: Any, dtype: Any) -> NDArray[Any] | None:
        """The values of a constant; None where they are computed."""
        data = self.model.buffers[self.subgraph.tensors[int(tensor)].buffer].data
        if data is None or int(tensor) in self.makers:
            return None
        return np.frombuffer(np.asarray(data, np.uint8).tobytes(), dtype)

    def operator(self, code: int, inputs: Sequence[int], outputs: Sequence[int]) -> Any:
        """A new operator, in no subgraph yet."""
        operator = schema.OperatorT()
        operator.opcodeIndex = self._opcode(code)
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        return operator

    def like(self, operator: Any, inputs: Sequence[int], outputs: Sequence[int]) -> Any:
        """A copy of an operator between other tensors, in no subgraph yet."""
        new = copy.copy(operator)
        new.inputs, new.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        return new

    def constant(self, values: NDArray[Any]) -> int:
        """A constant tensor; its buffer may be that of an equal one. Its name is a path: no weight has one."""
        key, buffers = (values.dtype.str, values.tobytes()), self.shared.buffers
        if key not in buffers:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(values.tobytes(), np.uint8)
            buffers[key] = len(self.model.buffers)
            self.model.buffers.append(buffer)
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.buffer = b"rewritten/constant", _TYPES[values.dtype], buffers[key]
        return self._add(tensor, list(values.shape))

    def tensor(self, like: int, shape: list[int] | None = None) -> int:
        """A new tensor of the type of another, and its shape if none is given."""
        return self._add(self.subgraph.tensors[like], self.shape(like) if shape is None else shape)

    def _opcode(self, builtin: int) -> int:
        for number, code in enumerate(self.model.operatorCodes):
            if (code.builtinCode, code.version) == (builtin, 1):
                return number
        code = schema.OperatorCodeT()
        # Readers from before there were more than 127 look at the other field.
        code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), 1
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def _add(self, like: Any, shape: list[int]) -> int:
        tensor = copy.copy(like)
        tensor.shape, tensor.hasRank = np.array(shape, np.int32), True
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1


def _used(model: Any, number: int, parameters: set[int]) -> dict[int, int]:
    """Leave in a subgraph the operators and tensors that lead to its outputs, parameters and inputs; return the new
    place of each tensor by its old one."""
    subgraph = model.subgraphs[number]
    subgraph.operators = leading_to(subgraph, (int(i) for i in subgraph.outputs))
    needed = parameters | {int(i) for owner in (subgraph, *subgraph.operators) for i in (*owner.inputs, *owner.outputs)}
    places = {old: new for new, old in enumerate(sorted(needed - {-1}))}
    subgraph.tensors = [subgraph.tensors[i] for i in places]
    for owner in (subgraph, *subgraph.operators):
        owner.inputs = np.array([places.get(int(i), -1) for i in owner.inputs], np.int32)
        owner.outputs = np.array([places[int(i)] for i in owner.outputs], np.int32)
    for entry in model.signatureDefs:
        if entry.subgraphIndex == number:
            for item in (*entry.inputs, *entry.outputs):
                item.tensorIndex = places[item.tensorIndex]
    return places
