"""Composites: operators that LiteRT-LM's GPU backend has a kernel for, by their names.

A composite carries its parts as a function, which every other backend runs. So the parts say what it computes, and its
attributes and inputs what the kernel is told. Some of these inputs no part uses. litert-torch's own composites, which
StableHLOCompositeBuilder marks in the traced graph, add such an input to a result, times zero; here it stays unused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from litert_converter.mlir import ir
from litert_converter.mlir.dialects import func, stablehlo
from litert_torch.backend.lowerings import lower

from mtp_export.formats.tflite.lowerings import constant, matmul, result_types, tfl

_numbers = itertools.count()  # of the functions with parts, whose names differ within a module
_SWAPPED = (0, 1, 3, 2)


def _composite(
    context: Any,
    name: str,
    attributes: Mapping[str, float],
    inputs: Sequence[Any],
    parts: Callable[..., Sequence[Any]],
) -> list[Any]:
    """Add a composite whose parts, as `parts` adds them, lead from `inputs` to its results; return these."""
    symbol = f"{name}.parts.{next(_numbers)}"
    with ir.InsertionPoint(context.ir_module.body):
        made = func.FuncOp.from_py_func(*(value.type for value in inputs), name=symbol)(parts)
    composite = stablehlo.CompositeOp(
        result=made.func_op.type.results,
        inputs=list(inputs),
        name=name,
        decomposition=symbol,
        num_composite_regions=0,
        composite_attributes={key: _attribute(value) for key, value in attributes.items()},
        version=1,
    )
    return list(composite.results)


def _attribute(value: float) -> Any:
    if isinstance(value, bool):
        return ir.BoolAttr.get(value)
    if isinstance(value, int):
        return ir.IntegerAttr.get(ir.IntegerType.get_signless(32), value)
    return ir.FloatAttr.get(ir.F32Type.get(), value)


def _type(shape: Sequence[int]) -> Any:
    return ir.RankedTensorType.get(list(shape), ir.F32Type.get())


@lower(torch.ops.mtp.cache_update.default)
def _cache_update(context: Any, rows: Sequence[Any], params: Any, caches: Sequence[Any], starts: Sequence[Any]) -> Any:
    def parts(*inputs: Any) -> list[Any]:
        key_rows, value_rows, _, keys, values, key_start, value_start = inputs
        swapped = _type([value_rows.type.shape[axis] for axis in _SWAPPED])
        columns = tfl("tfl.transpose", [value_rows, constant(_SWAPPED)], [swapped])
        return [
            tfl("tfl.dynamic_update_slice", [keys, key_rows, key_start], [keys.type]),
            tfl("tfl.dynamic_update_slice", [values, columns, value_start], [values.type]),
        ]

    _, groups, length, size = caches[0].type.shape
    attributes = {"kv_cache_batch_size": groups, "cache_size": length, "head_size": size, "is_ring_buffer": False}
    return _composite(context, "odml.cache_update", attributes, [*rows, params, *caches, *starts], parts)


@lower(torch.ops.mtp.runtime_bmm.default)
def _runtime_bmm(context: Any, x: Any, cache: Any, params: Any, of_values: bool) -> Any:
    results = result_types(context)

    def parts(x: Any, cache: Any, _: Any) -> list[Any]:
        return [matmul(x, cache, results, transposed=True)]

    attributes = {
        "is_global": True,  # masks say what is seen, in sliding layers too
        "is_src": of_values,
        "rhs_cache_update": True,
    }
    (result,) = _composite(context, "odml.runtime_bmm", attributes, [x, cache, params], parts)
    return result


@lower(torch.ops.mtp.rms_norm_composite.default)
def _rms_norm(context: Any, x: Any, weight: Any, eps: float) -> Any:
    shape, size = list(x.type.shape), x.type.shape[-1]
    if weight is None:  # the backend wants one
        weight = constant(np.ones(size), np.float32)
    whole = x.type
    if shape[:-1] == [1, 1, 1]:  # a single row, which the converter makes without the axis of heads
        x = stablehlo.reshape(_type([1, 1, size]), x)

    def parts(x: Any, weight: Any) -> list[Any]:
        column = _type([*x.type.shape[:-1], 1])
        squares = _product(x, x)
        mean = tfl("tfl.mean", [squares, constant([-1])], [column], keep_dims=True)
        shifted = tfl("tfl.add", [mean, constant(eps, np.float32)], [column], fused_activation_function="NONE")
        return [_product(_product(x, tfl("tfl.rsqrt", [shifted], [column])), weight)]

    (result,) = _composite(context, "odml.rms_norm", {"epsilon": eps}, [x, weight], parts)
    return result if result.type == whole else stablehlo.reshape(whole, result)


def _product(x: Any, y: Any) -> Any:
    return tfl("tfl.mul", [x, y], [x.type], fused_activation_function="NONE")
