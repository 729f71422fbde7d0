"""Segments → TFLite, through litert-torch (the renamed ai-edge-torch). Imported in worker processes alone: the
converter takes half a gigabyte and seconds to load.

Segments are converted many at a time, side by side in one graph, because torch.export and the converter take a second
for a graph of any size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the converter's native log is not for users
# Lower through litert-torch's own tfl ops, as its Gemma path does: fewer reshapes, and no detour through jax.
os.environ.setdefault("LITERT_TORCH_FULL_TFL_DECOMPS", "1")

import litert_torch
import numpy as np
import torch
from litert_converter.mlir import ir
from litert_converter.mlir.dialects import stablehlo
from litert_torch import progress
from litert_torch.backend import lowerings
from litert_torch.backend.lowerings import utils
from litert_torch.fx_infra.decomp import add_pre_lower_decomp
from torch import Tensor, nn

from mtp_export.graph.ir import Segment
from mtp_export.models import ops


class _SideBySide(nn.Module):
    """Calls modules that have nothing to do with each other, with their parameters taken from the inputs.

    Inputs and outputs are named `s{i}.{name}`, parameters `s{i}.w.{leaf}`. The modules are held in a tuple, out of
    sight of torch.export, which would lift their parameters into the graph.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.held = tuple(modules)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for i, module in enumerate(self.held):
            inputs: dict[str, Tensor] = {}
            weights: dict[str, Tensor] = {}
            for name, value in x.items():
                scope, _, leaf = name.partition(".")
                if scope == f"s{i}":
                    (weights if leaf.startswith("w.") else inputs)[leaf.removeprefix("w.")] = value
            results = torch.func.functional_call(module, weights, (), inputs, tie_weights=False)
            out |= {f"s{i}.{name}": value for name, value in results.items()}
        return out


def _placeholder(meta: Tensor) -> Tensor:
    """Return a tensor of the shape of `meta` that occupies four bytes."""
    return torch.zeros(1, dtype=meta.dtype).expand(meta.shape)


def convert(segments: Sequence[Segment]) -> bytes:
    """Convert segments to one TFLite model of one signature; see `_SideBySide` for its names."""
    samples: dict[str, Tensor] = {}
    for i, segment in enumerate(segments):
        samples |= {f"s{i}.{name}": _placeholder(t) for name, t in segment.inputs.items()}
        samples |= {f"s{i}.w.{leaf}": _placeholder(p) for leaf, p in segment.module.named_parameters()}
    module = _SideBySide([segment.module for segment in segments]).eval()
    progress.console.quiet = True  # the pipeline reports progress itself
    converter = litert_torch.signature("segments", module, sample_kwargs={"x": samples})
    return bytes(converter.convert(strict_export=False).model_content())


# TFLite has no such operator, and its parts are what XNNPACK fuses.
add_pre_lower_decomp(torch.ops.mtp.rms_norm.default, ops.decomposed_rms_norm)


def _tfl(lctx: Any, name: str, operands: Sequence[Any], results: Sequence[Any] | None = None, **attributes: int) -> Any:
    """Append a TFLite op by its name; stablehlo's custom call is the carrier that litert-torch's own lowerings use."""
    i32 = ir.IntegerType.get_signless(32)
    config = ir.DictAttr.get(
        {k: ir.BoolAttr.get(v) if isinstance(v, bool) else ir.IntegerAttr.get(i32, v) for k, v in attributes.items()}
    )
    return stablehlo.custom_call(
        result=utils.node_meta_to_ir_types(lctx.node) if results is None else results,
        inputs=list(operands),
        call_target_name=ir.StringAttr.get(name),
        has_side_effect=ir.BoolAttr.get(False),
        backend_config=ir.StringAttr.get(str(config)),
    )


def _constant(value: Any) -> Any:
    return utils.numpy_array_constant(np.array(value, dtype=np.int32))


@lowerings.lower(torch.ops.mtp.gather.default)
def _gather(lctx: Any, x: Any, indices: Any, axis: int) -> Any:
    return _tfl(lctx, "tfl.gather", [x, indices], axis=axis, batch_dims=0)


@lowerings.lower(torch.ops.mtp.matmul_transposed.default)
def _matmul_transposed(lctx: Any, x: Any, y: Any) -> Any:
    # As a dot product the converter would make it a FULLY_CONNECTED with a variable filter, which XNNPACK leaves to a
    # kernel three times slower at five tokens.
    return _tfl(lctx, "tfl.batch_matmul", [x, y], adj_x=False, adj_y=True, asymmetric_quantize_inputs=False)


@lowerings.lower(torch.ops.mtp.matmul.default)
def _matmul(lctx: Any, x: Any, y: Any) -> Any:
    # torch.matmul drops an axis of `y` that has one element, and of such a product the GPU makes something else.
    return _tfl(lctx, "tfl.batch_matmul", [x, y], adj_x=False, adj_y=False, asymmetric_quantize_inputs=False)


@lowerings.lower(torch.ops.mtp.top_k.default)
def _top_k(lctx: Any, x: Any, k: int) -> Any:
    (indices,) = utils.node_meta_to_ir_types(lctx.node)
    values = ir.RankedTensorType.get(ir.RankedTensorType(indices).shape, ir.F32Type.get())
    return _tfl(lctx, "tfl.topk_v2", [x, _constant(k)], [values, indices])[1]


@lowerings.lower(torch.ops.mtp.scatter.default)
def _scatter(lctx: Any, indices: Any, values: Any, size: int) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    column = ir.RankedTensorType.get([*ir.RankedTensorType(indices.type).shape, 1], i32)
    return _tfl(lctx, "tfl.scatter_nd", [stablehlo.reshape(column, indices), values, _constant([size])])


@lowerings.lower(torch.ops.mtp.update_cache.default)
def _update_cache(lctx: Any, cache: Any, rows: Any, position: Any) -> Any:
    first = stablehlo.slice(position, start_indices=[0], limit_indices=[1], strides=[1])
    # In one vector from the start: stablehlo's operation wants numbers without axes, and a GPU takes none.
    start = stablehlo.concatenate([_constant([0, 0]), first, _constant([0])], dimension=0)
    return _tfl(lctx, "tfl.dynamic_update_slice", [cache, rows, start])
