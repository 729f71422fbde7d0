"""Norms square in the shape that they sum in.

Of a single row the converter squares first and reshapes the squares. XNNPACK makes one operator of a square and the
mean of it where they are neighbours, and on some processors (AVX-512) that rounds once where the two round twice: a
token's norms had other bits alone than beside others (docs/decisions/0011).
"""

from __future__ import annotations

import numpy as np

from mtp_export.formats.tflite.chain import LoweredGraph
from mtp_export.formats.tflite.rewriting import CODES, Rewriting, rewrite


def with_squares_reshaped_first(lowered: LoweredGraph) -> LoweredGraph:
    """Rewrite a graph, in place: mean(reshape(x * x)) as mean(reshape(x) * reshape(x))."""
    return rewrite(lowered, _Squares)


class _Squares(Rewriting):
    def run(self) -> None:
        for mean in list(self.subgraph.operators):
            if self.code(mean) != CODES.MEAN:
                continue
            reshape = self.maker(mean.inputs[0], CODES.RESHAPE)
            square = reshape and self.maker(reshape.inputs[0], CODES.MUL)
            alone = square and len(self.users_of(square.outputs[0])) == len(self.users_of(reshape.outputs[0])) == 1
            if not alone or square.inputs[0] != square.inputs[1] or self.values(reshape.inputs[1], np.int32) is None:
                continue
            squares = int(reshape.outputs[0])
            x = self.tensor(squares)
            self.subgraph.operators[self.place(square)] = self.like(reshape, [square.inputs[0], reshape.inputs[1]], [x])
            self.subgraph.operators[self.place(reshape)] = self.like(square, [x, x], [squares])
