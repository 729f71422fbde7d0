"""Products with what is filled of a cache have the cache as their left factor.

XNNPACK reads a left factor as it lies and packs the right one anew at each call, which costs more than the product
itself where the other factor has few rows. The converter undoes such an order, so it is made behind it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from mtp_export.formats.tflite.chain import LoweredGraph
from mtp_export.formats.tflite.rewriting import CODES, Rewriting, rewrite

_SWAP = [0, 1, 3, 2]


def with_caches_first(lowered: LoweredGraph) -> LoweredGraph:
    """Rewrite the passes over few tokens, in place: x @ cache^T as (cache @ x^T)^T."""
    return rewrite(lowered, _CachesFirst)


class _CachesFirst(Rewriting):
    def run(self) -> None:
        if self.entry.signatureKey.decode().startswith("prefill"):
            return
        operators = []
        for operator in self.subgraph.operators:
            operators += self._swapped(operator) if self._is_over_filled(operator) else [operator]
        self.subgraph.operators = operators

    def _is_over_filled(self, operator: Any) -> bool:
        if self.code(operator) != CODES.BATCH_MATMUL or not operator.builtinOptions.adjY:
            return False
        signature = self.subgraph.tensors[int(operator.inputs[1])].shapeSignature
        return signature is not None and -1 in signature

    def _swapped(self, product: Any) -> list[Any]:
        x, cache, out = int(product.inputs[0]), int(product.inputs[1]), int(product.outputs[0])
        result = self.subgraph.tensors[out]
        turned = self.tensor(out, [int(result.shape[axis]) for axis in _SWAP])
        if result.shapeSignature is not None:
            self.subgraph.tensors[turned].shapeSignature = result.shapeSignature[_SWAP]
        transpose = self.operator(CODES.TRANSPOSE, [turned, self.constant(np.array(_SWAP, np.int32))], [out])
        transpose.builtinOptionsType = schema.BuiltinOptions.TransposeOptions
        transpose.builtinOptions = schema.TransposeOptionsT()
        return [self.like(product, [cache, x], [turned]), transpose]
