"""Fewer operators for a GPU, which spends its time on starting them and not on their arithmetic.

LiteRT-LM's GPU backend has one kernel for a norm, by the name of a composite. Every other backend runs its parts, and
so gives the bits that it gave before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from mtp_export.formats.tflite.chain import LoweredGraph, leading_to
from mtp_export.formats.tflite.rewriting import CODES, Rewriting, rewrite

RMS_NORM = "odml.rms_norm"


def with_composites(lowered: LoweredGraph) -> LoweredGraph:
    """Rewrite a graph, in place, for a GPU: norms as composites, and halves swapped by one look-up."""
    return rewrite(lowered, _Norms)


class _Norms(Rewriting):
    def run(self) -> None:
        for operator in list(self.subgraph.operators):
            self._swap_halves(operator)
            self._compose_norm(operator)

    def _swap_halves(self, operator: Any) -> None:
        """A rotation's concat(x[half:], x[:half]) as one GATHER of the last axis."""
        if self.code(operator) != CODES.CONCATENATION or len(operator.inputs) != 2:
            return
        slices = [self.maker(i, CODES.SLICE) for i in operator.inputs]
        if None in slices or slices[0].inputs[0] != slices[1].inputs[0]:
            return
        x = int(slices[0].inputs[0])
        *leading, size = self.shape(x)
        half = size // 2
        starts = [self.values(part.inputs[1], np.int32) for part in slices]
        expected = [[*(0 for _ in leading), half], [0] * (len(leading) + 1)]
        if [None if start is None else start.tolist() for start in starts] != expected:
            return
        if size % 2 or any(self.shape(part.outputs[0]) != [*leading, half] for part in slices):
            return
        if self.shape(operator.outputs[0]) != self.shape(x):
            return
        order = self.constant(np.roll(np.arange(size, dtype=np.int32), -half))
        options = schema.GatherOptionsT()
        options.axis = len(leading)
        gather = self.operator(CODES.GATHER, [x, order], operator.outputs)
        gather.builtinOptions, gather.builtinOptionsType = options, schema.BuiltinOptions.GatherOptions
        self.subgraph.operators[self.place(operator)] = gather

    def _compose_norm(self, rsqrt: Any) -> None:
        """x * rsqrt(mean(x * x) + eps) * weight as one composite. The backend wants a weight: without one it is given
        ones, which the parts do not use."""
        if self.code(rsqrt) != CODES.RSQRT:
            return
        add = self.maker(rsqrt.inputs[0], CODES.ADD)
        mean = add and self.maker(add.inputs[0], CODES.MEAN)
        # Of a single row the converter squares first, and reshapes what it squared.
        reshape = mean and self.maker(mean.inputs[0], CODES.RESHAPE)
        square = mean and self.maker((reshape or mean).inputs[0], CODES.MUL)
        users = self.users_of(rsqrt.outputs[0])
        if square is None or not self._alone(users):
            return
        x, last = int(square.inputs[0]), users[0]
        size, epsilon = self.shape(x)[-1], self.values(add.inputs[1], np.float32)
        if not (x == square.inputs[1] == last.inputs[0] and self._over_last(mean, size)):
            return
        if epsilon is None or epsilon.size != 1:
            return
        weight = self._weight_after(last)
        if weight is None:
            weight = self.constant(np.ones(size, np.float32))
        else:
            (last,) = self.users_of(last.outputs[0])
        if all(self._is_plain(operator) for operator in (square, add, last, users[0])):
            self._compose({"epsilon": float(epsilon[0])}, (x, weight), int(last.outputs[0]))

    def _over_last(self, mean: Any, size: int) -> bool:
        """Whether a mean is that of the last axis, which has `size` elements."""
        shape, axes = self.shape(mean.inputs[0]), self.values(mean.inputs[1], np.int32)
        return shape[-1] == size and axes is not None and axes.tolist() in ([-1], [len(shape) - 1])

    def _is_plain(self, operator: Any) -> bool:
        """Whether nothing is fused to a sum or product."""
        return not getattr(operator.builtinOptions, "fusedActivationFunction", 0)

    def _alone(self, users: Sequence[Any]) -> bool:
        """Whether a product is all that a tensor is used for."""
        return len(users) == 1 and users[0] is not None and self.code(users[0]) == CODES.MUL

    def _weight_after(self, scaled: Any) -> int | None:
        """The parameter that a norm's row is multiplied with next, if there is one."""
        users = self.users_of(scaled.outputs[0])
        if not self._alone(users):
            return None
        weight = int(users[0].inputs[1])
        same = self.shape(weight) == self.shape(scaled.outputs[0])[-1:]
        return weight if same and weight not in self.makers else None

    def _compose(self, attributes: Mapping[str, float], inputs: tuple[int, int], output: int) -> None:
        """Put a composite in place of what leads from `inputs` to `output`. It gives the shape of the first of them;
        what follows is given `output` in its own."""
        chosen = leading_to(self.subgraph, [output], inputs)
        place = self.place(chosen[-1])
        result, after = output, []
        if self.shape(inputs[0]) != self.shape(output):
            result = self.tensor(output, self.shape(inputs[0]))
            chosen.append(self._reshape(output, result))
            after.append(self._reshape(result, output))
        composite = self.composite(RMS_NORM, attributes, inputs, [result], chosen)
        self.subgraph.operators[place : place + 1] = [composite, *after]

    def _reshape(self, x: int, output: int) -> Any:
        shape = self.constant(np.array(self.shape(output), np.int32))
        return self.operator(CODES.RESHAPE, [x, shape], [output])
