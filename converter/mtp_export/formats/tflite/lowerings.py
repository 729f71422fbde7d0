"""How our own torch operations become TFLite's. Imported in worker processes alone, as the converter is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from litert_converter.mlir import ir
from litert_converter.mlir.dialects import stablehlo
from litert_torch.backend.lowerings import lower, utils
from litert_torch.fx_infra.decomp import add_pre_lower_decomp

from mtp_export.models import ops

# TFLite has no such operator, and its parts are what XNNPACK fuses.
add_pre_lower_decomp(torch.ops.mtp.rms_norm.default, ops.decomposed_rms_norm)


def tfl(name: str, operands: Sequence[Any], results: Sequence[Any], **attributes: float | str) -> Any:
    """Add a TFLite op by its MLIR name, with results of these types; return its values.

    stablehlo's custom call is the carrier that litert-torch's own lowerings use.
    """
    return stablehlo.custom_call(
        result=list(results),
        inputs=list(operands),
        call_target_name=ir.StringAttr.get(name),
        has_side_effect=ir.BoolAttr.get(False),
        backend_config=ir.StringAttr.get(str(ir.DictAttr.get({k: _attribute(v) for k, v in attributes.items()}))),
    )


def _attribute(value: float | str) -> Any:
    if isinstance(value, str):
        return ir.StringAttr.get(value)
    if isinstance(value, bool):
        return ir.BoolAttr.get(value)
    if isinstance(value, float):
        return ir.FloatAttr.get(ir.F32Type.get(), value)
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(32), value)


def constant(value: Any, dtype: type[np.generic] = np.int32) -> Any:
    """Add a constant tensor."""
    return utils.numpy_array_constant(np.array(value, dtype=dtype))


def result_types(context: Any) -> list[Any]:
    """Return the types of what the lowered operation returns."""
    types: list[Any] = utils.node_meta_to_ir_types(context.node)
    return types


@lower(torch.ops.mtp.gather.default)
def _gather(context: Any, x: Any, indices: Any, axis: int) -> Any:
    return tfl("tfl.gather", [x, indices], result_types(context), axis=axis, batch_dims=0)


def matmul(x: Any, y: Any, results: Sequence[Any], *, transposed: bool) -> Any:
    """Add x @ y, or x @ y^T."""
    options = {"adj_x": False, "adj_y": transposed, "asymmetric_quantize_inputs": False}
    return tfl("tfl.batch_matmul", [x, y], results, **options)


@lower(torch.ops.mtp.matmul_transposed.default)
def _matmul_transposed(context: Any, x: Any, y: Any) -> Any:
    # As a dot product the converter would make it a FULLY_CONNECTED with a variable filter, which XNNPACK leaves to a
    # kernel three times slower at five tokens.
    return matmul(x, y, result_types(context), transposed=True)


@lower(torch.ops.mtp.matmul.default)
def _matmul(context: Any, x: Any, y: Any) -> Any:
    # torch.matmul drops an axis of `y` that has one element, and of such a product the GPU makes something else.
    return matmul(x, y, result_types(context), transposed=False)


@lower(torch.ops.mtp.top_k.default)
def _top_k(context: Any, x: Any, k: int) -> Any:
    (indices,) = result_types(context)
    values = ir.RankedTensorType.get(ir.RankedTensorType(indices).shape, ir.F32Type.get())
    return tfl("tfl.topk_v2", [x, constant(k)], [values, indices])[1]


@lower(torch.ops.mtp.scatter.default)
def _scatter(context: Any, indices: Any, values: Any, size: int) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    column = ir.RankedTensorType.get([*ir.RankedTensorType(indices.type).shape, 1], i32)
    operands = [stablehlo.reshape(column, indices), values, constant([size])]
    return tfl("tfl.scatter_nd", operands, result_types(context))
