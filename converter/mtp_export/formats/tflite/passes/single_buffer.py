"""Caches that a GPU writes in place and reads as far as they are filled.

LiteRT-LM's GPU backend has a kernel for each of the two, by the names of composites, and keeps one set of caches where
a signature has an input `param_tensor`: it says which slots a pass writes and how many are filled then. Without it
there are two sets, and every pass copies all of the caches from one to the other.

The kernels keep keys and values as matrices of weights; what a graph states as the values' shape is [1,G,D,S], with the
product over slots last.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np

from mtp_export.formats.tflite.chain import LoweredGraph
from mtp_export.formats.tflite.rewriting import CODES, Rewriting, rewrite
from mtp_runtime.bundle.contract import PARAM_TENSOR, CacheName

CACHE_UPDATE = "odml.cache_update"
RUNTIME_BMM = "odml.runtime_bmm"
_SWAPPED = (0, 1, 3, 2)


def with_single_buffer(lowered: LoweredGraph) -> LoweredGraph:
    """Rewrite a graph, in place, that was traced with `GraphShape.single_buffer`."""
    return rewrite(lowered, _Caches)


class _Caches(Rewriting):
    def run(self) -> None:
        inputs = {item.name.decode(): int(item.tensorIndex) for item in self.entry.inputs}
        params = inputs[PARAM_TENSOR]
        starts: tuple[int, int] | None = None
        for name, keys in inputs.items():
            if not CacheName.in_name(name) or (own := CacheName.parse(name)).part != "k":
                continue
            values = inputs[str(dataclasses.replace(own, part="v"))]
            writes = [self._using(cache, CODES.DYNAMIC_UPDATE_SLICE) for cache in (keys, values)]
            read = (keys, values)
            if any(writes):
                ((write_keys,), (write_values,)) = writes
                starts = starts or self._starts(write_keys)
                read = self._write(write_keys, write_values, params, starts)
            for cache, of_values in zip(read, (False, True), strict=True):
                for product in self._using(cache, CODES.BATCH_MATMUL):
                    self._product(product, cache, params, of_values=of_values)

    def _using(self, tensor: int, code: int) -> list[Any]:
        """The operators of one kind that use a tensor.

        Raises:
            AssertionError: others do.
        """
        operators = [operator for operator in self.users_of(tensor) if operator is not None]
        found = [operator for operator in operators if self.code(operator) == code]
        others = {self.code(operator) for operator in operators} - {CODES.DYNAMIC_UPDATE_SLICE, CODES.BATCH_MATMUL}
        if others:
            raise AssertionError(f"a cache is used by operators {sorted(others)}")
        return found

    def _starts(self, write_keys: Any) -> tuple[int, int]:
        """Where the pass's first slot is in keys and in values, made once: before the first cache is written, and so
        before all are."""
        made = self.maker(write_keys.inputs[2], CODES.CONCATENATION)
        first = int(made.inputs[1])
        start, values_start = (self.tensor(int(made.outputs[0])) for _ in range(2))
        zeros = [self.constant(np.zeros(n, np.int32)) for n in (1, 2, 3)]
        added = [
            self.like(made, [zeros[1], first, zeros[0]], [start]),
            self.like(made, [zeros[2], first], [values_start]),
        ]
        place = self.place(self.makers[first]) + 1 if first in self.makers else 0
        self.subgraph.operators[place:place] = added
        return start, values_start

    def _write(self, write_keys: Any, write_values: Any, params: int, starts: tuple[int, int]) -> tuple[int, int]:
        """Put a composite in place of what writes the rows of a pass; the caches that it gives."""
        (keys, key_rows, _), (values, value_rows, _) = ([int(i) for i in w.inputs] for w in (write_keys, write_values))
        written = int(write_keys.outputs[0]), int(write_values.outputs[0])
        self.subgraph.tensors[written[1]].shape = np.array(self.shape(values), np.int32)
        swapped = self.tensor(value_rows, [self.shape(value_rows)[axis] for axis in _SWAPPED])
        order = self.constant(np.array(_SWAPPED, np.int32))
        parts = [
            self.like(write_keys, [keys, key_rows, starts[0]], [written[0]]),
            self.operator(CODES.TRANSPOSE, [value_rows, order], [swapped]),
            self.like(write_values, [values, swapped, starts[1]], [written[1]]),
        ]
        _, groups, length, size = self.shape(keys)
        attributes = {
            "kv_cache_batch_size": groups,
            "cache_size": length,
            "head_size": size,
            "is_ring_buffer": False,
        }
        inputs = (key_rows, value_rows, params, keys, values, *starts)
        composite = self.composite(CACHE_UPDATE, attributes, inputs, written, parts)
        first, last = sorted(self.place(write) for write in (write_keys, write_values))
        self.subgraph.operators[last] = composite
        del self.subgraph.operators[first]
        return written

    def _product(self, product: Any, cache: int, params: int, *, of_values: bool) -> None:
        """Put a composite in place of a product with a cache: the filled slots of keys are what it gives, those of
        values what it sums over."""
        x, output = int(product.inputs[0]), int(product.outputs[0])
        if int(product.inputs[1]) != cache or product.builtinOptions.adjY == of_values:
            raise AssertionError("a product takes a cache in another way")
        transposed = self.like(product, [x, cache], [output])
        transposed.builtinOptions = copy.copy(product.builtinOptions)
        transposed.builtinOptions.adjY = True
        attributes = {
            "is_global": True,  # masks say what is seen, in sliding layers too
            "is_src": of_values,
            "rhs_cache_update": True,
        }
        composite = self.composite(RUNTIME_BMM, attributes, (x, cache, params), [output], [transposed])
        self.subgraph.operators[self.place(product)] = composite
