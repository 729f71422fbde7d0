"""Fewer operators for a GPU, which spends its time on starting them and not on their arithmetic.

LiteRT-LM's GPU backend has one kernel for a norm. TFLite has no such operator, but composites: a name, and the parts as
a subgraph, which a backend runs that does not know the name. So every other backend gives the bits that it gave before.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers
from numpy.typing import NDArray

from mtp_export.lower.tflite import LoweredGraph, leading_to

RMS_NORM = "odml.rms_norm"
_CODES = schema.BuiltinOperator
_TYPES = {np.dtype(np.float32): schema.TensorType.FLOAT32, np.dtype(np.int32): schema.TensorType.INT32}


def with_composites(lowered: LoweredGraph) -> LoweredGraph:
    """Rewrite a graph, in place, for a GPU: norms as composites, and halves swapped by one look-up. The result is the
    graph with the places that its parameters have then."""
    model, shared = lowered.model, _Shared()
    weights = [place for places in lowered.weights.values() for place in places]
    kept = []
    for number, subgraph in enumerate(list(model.subgraphs)):
        rewriting = _Rewriting(model, subgraph, shared)
        for operator in list(subgraph.operators):
            rewriting.swap_halves(operator)
            rewriting.compose_norm(operator)
        kept.append(_without_unused(model, number, {index for s, index in weights if s == number}))
    moved = {name: [(s, kept[s][index]) for s, index in places] for name, places in lowered.weights.items()}
    return dataclasses.replace(lowered, weights=moved)


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What is in a model once: the subgraphs of composites' parts, by all that they compute, and constants."""

    parts: dict[object, int] = dataclasses.field(default_factory=dict)
    buffers: dict[tuple[str, bytes], int] = dataclasses.field(default_factory=dict)


class _Rewriting:
    """One subgraph while it is rewritten."""

    def __init__(self, model: Any, subgraph: Any, shared: _Shared) -> None:
        self.model, self.subgraph, self.shared = model, subgraph, shared
        self.makers = {int(i): operator for operator in subgraph.operators for i in operator.outputs}
        self.users: dict[int, list[Any]] = {int(i): [None] for i in subgraph.outputs}
        for operator in subgraph.operators:
            for i in operator.inputs:
                self.users.setdefault(int(i), []).append(operator)

    def swap_halves(self, operator: Any) -> None:
        """A rotation's concat(x[half:], x[:half]) as one GATHER of the last axis."""
        if self._code(operator) != _CODES.CONCATENATION or len(operator.inputs) != 2:
            return
        slices = [self._maker(i, _CODES.SLICE) for i in operator.inputs]
        if None in slices or slices[0].inputs[0] != slices[1].inputs[0]:
            return
        x = int(slices[0].inputs[0])
        *leading, size = self._shape(x)
        half = size // 2
        starts = [self._values(part.inputs[1], np.int32) for part in slices]
        expected = [[*(0 for _ in leading), half], [0] * (len(leading) + 1)]
        if [None if start is None else start.tolist() for start in starts] != expected:
            return
        if size % 2 or any(self._shape(part.outputs[0]) != [*leading, half] for part in slices):
            return
        if self._shape(operator.outputs[0]) != self._shape(x):
            return
        order = self._constant(np.roll(np.arange(size, dtype=np.int32), -half))
        options = schema.GatherOptionsT()
        options.axis = len(leading)
        gather = self._operator(_CODES.GATHER, [x, order], operator.outputs)
        gather.builtinOptions, gather.builtinOptionsType = options, schema.BuiltinOptions.GatherOptions
        self.subgraph.operators[self._place(operator)] = gather

    def compose_norm(self, rsqrt: Any) -> None:
        """x * rsqrt(mean(x * x) + eps) * weight as one composite. The backend wants a weight: without one it is given
        ones, which the parts do not use."""
        if self._code(rsqrt) != _CODES.RSQRT:
            return
        add = self._maker(rsqrt.inputs[0], _CODES.ADD)
        mean = add and self._maker(add.inputs[0], _CODES.MEAN)
        # Of a single row the converter squares first, and reshapes what it squared.
        reshape = mean and self._maker(mean.inputs[0], _CODES.RESHAPE)
        square = mean and self._maker((reshape or mean).inputs[0], _CODES.MUL)
        users = self._users(rsqrt.outputs[0])
        if square is None or not self._alone(users):
            return
        x, last = int(square.inputs[0]), users[0]
        size, epsilon = self._shape(x)[-1], self._values(add.inputs[1], np.float32)
        if not (x == square.inputs[1] == last.inputs[0] and self._over_last(mean, size)):
            return
        if epsilon is None or epsilon.size != 1:
            return
        weight = self._weight_after(last)
        if weight is None:
            weight = self._constant(np.ones(size, np.float32))
        else:
            (last,) = self._users(last.outputs[0])
        if all(self._is_plain(operator) for operator in (square, add, last, users[0])):
            self._compose(RMS_NORM, {"epsilon": float(epsilon[0])}, (x, weight), int(last.outputs[0]), self._shape(x))

    def _over_last(self, mean: Any, size: int) -> bool:
        """Whether a mean is that of the last axis, which has `size` elements."""
        shape, axes = self._shape(mean.inputs[0]), self._values(mean.inputs[1], np.int32)
        return shape[-1] == size and axes is not None and axes.tolist() in ([-1], [len(shape) - 1])

    def _is_plain(self, operator: Any) -> bool:
        """Whether nothing is fused to a sum or product."""
        return not getattr(operator.builtinOptions, "fusedActivationFunction", 0)

    def _weight_after(self, scaled: Any) -> int | None:
        """The parameter that a norm's row is multiplied with next, if there is one."""
        users = self._users(scaled.outputs[0])
        if not self._alone(users):
            return None
        weight = int(users[0].inputs[1])
        same = self._shape(weight) == self._shape(scaled.outputs[0])[-1:]
        return weight if same and weight not in self.makers else None

    def _compose(
        self, name: str, attributes: dict[str, float], inputs: tuple[int, int], output: int, shape: list[int]
    ) -> None:
        """Put a composite in place of what leads from `inputs` to `output`. It gives `shape`; what follows is given
        `output` in its own."""
        chosen = leading_to(self.subgraph, [output], inputs)
        place = self._place(chosen[-1])
        result, after = output, []
        if shape != self._shape(output):
            result = self._tensor(self.subgraph.tensors[output], shape)
            chosen.append(self._reshape(output, result))
            after.append(self._reshape(result, output))
        steps = tuple(self._code(operator) for operator in chosen)
        key = (name, steps, *attributes.items(), *(tuple(self._shape(i)) for i in (*inputs, result, output)))
        if key not in self.shared.parts:
            self.shared.parts[key] = len(self.model.subgraphs)
            self.model.subgraphs.append(self._parts(name, chosen, inputs, result))
        options = schema.StableHLOCompositeOptionsT()
        options.name, options.version = name.encode(), 1
        options.decompositionSubgraphIndex = self.shared.parts[key]
        options.compositeAttributes = np.frombuffer(bytes(flexbuffers.Dumps(attributes)), np.uint8)
        composite = self._operator(_CODES.STABLEHLO_COMPOSITE, inputs, [result])
        composite.builtinOptions2Type = schema.BuiltinOptions2.StableHLOCompositeOptions
        composite.builtinOptions2 = options
        self.subgraph.operators[place : place + 1] = [composite, *after]

    def _parts(self, name: str, operators: Sequence[Any], inputs: Sequence[int], output: int) -> Any:
        """A subgraph of copies of `operators`."""
        subgraph = schema.SubGraphT()
        subgraph.name, subgraph.tensors, subgraph.operators = f"{name}.parts".encode(), [], []
        copies = {-1: -1}

        def copied(index: int) -> int:
            if index not in copies:
                tensor = copy.copy(self.subgraph.tensors[index])
                tensor.name = str(len(subgraph.tensors)).encode()
                if index in inputs:
                    tensor.buffer = 0
                copies[index] = len(subgraph.tensors)
                subgraph.tensors.append(tensor)
            return copies[index]

        subgraph.inputs = np.array([copied(i) for i in inputs], np.int32)
        for operator in operators:
            new = copy.copy(operator)
            new.inputs = np.array([copied(int(i)) for i in operator.inputs], np.int32)
            new.outputs = np.array([copied(int(i)) for i in operator.outputs], np.int32)
            subgraph.operators.append(new)
        subgraph.outputs = np.array([copied(output)], np.int32)
        return subgraph

    def _code(self, operator: Any) -> int:
        return int(self.model.operatorCodes[operator.opcodeIndex].builtinCode)

    def _maker(self, tensor: Any, code: int) -> Any:
        """The operator that makes a tensor, None where it is of another kind."""
        operator = self.makers.get(int(tensor))
        return operator if operator is not None and self._code(operator) == code else None

    def _alone(self, users: Sequence[Any]) -> bool:
        """Whether a product is all that a tensor is used for."""
        return len(users) == 1 and users[0] is not None and self._code(users[0]) == _CODES.MUL

    def _users(self, tensor: Any) -> list[Any]:
        """The operators that a tensor is an input of; None stands for the subgraph's caller."""
        return self.users.get(int(tensor), [])

    def _place(self, operator: Any) -> int:
        return next(i for i, other in enumerate(self.subgraph.operators) if other is operator)

    def _shape(self, tensor: Any) -> list[int]:
        return [int(n) for n in self.subgraph.tensors[int(tensor)].shape]

    def _values(self, tensor: Any, dtype: Any) -> NDArray[Any] | None:
        """The values of a constant; None where they are computed."""
        data = self.model.buffers[self.subgraph.tensors[int(tensor)].buffer].data
        if data is None or int(tensor) in self.makers:
            return None
        return np.frombuffer(np.asarray(data, np.uint8).tobytes(), dtype)

    def _operator(self, code: int, inputs: Sequence[int], outputs: Sequence[int]) -> Any:
        operator = schema.OperatorT()
        operator.opcodeIndex = self._opcode(code)
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        return operator

    def _reshape(self, x: int, output: int) -> Any:
        shape = self._constant(np.array(self._shape(output), np.int32))
        return self._operator(_CODES.RESHAPE, [x, shape], [output])

    def _opcode(self, builtin: int) -> int:
        for number, code in enumerate(self.model.operatorCodes):
            if (code.builtinCode, code.version) == (builtin, 1):
                return number
        code = schema.OperatorCodeT()
        # Readers from before there were more than 127 look at the other field.
        code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), 1
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def _constant(self, values: NDArray[Any]) -> int:
        """A constant tensor; it and its buffer may be those of an equal one."""
        key, buffers = (values.dtype.str, values.tobytes()), self.shared.buffers
        if key not in buffers:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(values.tobytes(), np.uint8)
            buffers[key] = len(self.model.buffers)
            self.model.buffers.append(buffer)
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.buffer = b"constant", _TYPES[values.dtype], buffers[key]
        return self._tensor(tensor, list(values.shape))

    def _tensor(self, like: Any, shape: list[int]) -> int:
        tensor = copy.copy(like)
        tensor.shape, tensor.hasRank = np.array(shape, np.int32), True
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1


def _without_unused(model: Any, number: int, parameters: set[int]) -> dict[int, int]:
    """Take from a subgraph the operators and tensors that lead to none of its outputs, parameters excepted; from a
    tensor's old place to its new one."""
    subgraph = model.subgraphs[number]
    subgraph.operators = leading_to(subgraph, (int(i) for i in subgraph.outputs))
    wanted = parameters | {int(i) for owner in (subgraph, *subgraph.operators) for i in (*owner.inputs, *owner.outputs)}
    places = {old: new for new, old in enumerate(sorted(wanted - {-1}))}
    subgraph.tensors = [subgraph.tensors[i] for i in places]
    for owner in (subgraph, *subgraph.operators):
        owner.inputs = np.array([places.get(int(i), -1) for i in owner.inputs], np.int32)
        owner.outputs = np.array([places[int(i)] for i in owner.outputs], np.int32)
    for entry in model.signatureDefs:
        if entry.subgraphIndex == number:
            for item in (*entry.inputs, *entry.outputs):
                item.tensorIndex = places[item.tensorIndex]
    return places
