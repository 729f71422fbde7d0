"""Targets that are published as integers, in the layout of compressed-tensors: which matrix is stored how.

What is known of the two published kinds, from their configs: `qat-w4a16-ct` has every linear layer at 4 bits with a
bfloat16 scale for 32 columns, and tables in bfloat16. `qat-mobile-ct` has attention and MLP at 4 bits and the token
embedding at 2, with a float32 scale for a row; per-layer embeddings at 2 bits with one for each layer's part of a row;
the gates and projections of per-layer inputs at 8 bits; and static scales of activations. How its one
`per_layer_model_projection` is stored is not known: here it is like the others of its kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mtp_export.weights.recipes import WeightFormat
from tools.synthesize.layout import StoredTensor
from tools.synthesize.values import STEPS

W4A16, MOBILE = "qat-w4a16-ct", "qat-mobile-ct"
VARIANTS = (W4A16, MOBILE)
_EMBEDDING, _PER_LAYER_EMBEDDING = "embed_tokens", "embed_tokens_per_layer"
_PER_LAYER_INPUTS = ("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection")
_WORD_BITS = 32
_ACTIVATION_SCALE = 0.05
_ROWS = 0


def quantised(tensors: Sequence[StoredTensor], variant: str, per_layer_size: int) -> list[StoredTensor]:
    """Return the tensors of a target as a variant stores them."""
    stored: list[StoredTensor] = []
    for tensor in tensors:
        format = _format(tensor, variant, per_layer_size)
        stored += [tensor] if format is None else _stored(tensor, format, variant)
    return stored


def _format(tensor: StoredTensor, variant: str, per_layer_size: int) -> WeightFormat | None:
    if len(tensor.shape) != 2:
        return None
    module = tensor.name.split(".")[-2]
    tables = {_EMBEDDING: _ROWS, _PER_LAYER_EMBEDDING: per_layer_size}
    if variant == W4A16:
        return None if module in tables else WeightFormat(bits=4, block_size=32)
    if module in tables:
        return WeightFormat(bits=2, block_size=tables[module])
    return WeightFormat(bits=8 if module in _PER_LAYER_INPUTS else 4, block_size=_ROWS)


def _stored(matrix: StoredTensor, format: WeightFormat, variant: str) -> list[StoredTensor]:
    module, (rows, columns), bits = matrix.name.removesuffix(".weight"), matrix.shape, format.bits
    groups = columns // format.block_size if format.block_size else 1
    scales = StoredTensor(
        name=f"{module}.weight_scale",
        shape=(rows, groups),
        spread=matrix.spread * STEPS[bits],
        dtype="BF16" if variant == W4A16 else "F32",
        content="scales",
    )
    if bits == 8:
        integers = [dataclasses.replace(matrix, dtype="I8", content="integers", bits=bits)]
    else:
        width = columns * bits // _WORD_BITS
        integers = [
            StoredTensor(
                name=f"{module}.weight_packed",
                shape=(rows, width),
                spread=0.0,
                dtype="I32",
                content="integers",
                bits=bits,
            ),
            _constant(f"{module}.weight_shape", "I64", matrix.shape),
        ]
    if variant == W4A16 or _EMBEDDING in module:
        return [*integers, scales]
    of_activations = [_constant(f"{module}.{side}_scale", "F32", (_ACTIVATION_SCALE,)) for side in ("input", "output")]
    return [*integers, scales, *of_activations]


def _constant(name: str, dtype: str, values: tuple[float, ...]) -> StoredTensor:
    return StoredTensor(name=name, shape=(len(values),), spread=0.0, dtype=dtype, content="constant", values=values)


def quantization_config(variant: str, per_layer_size: int) -> dict[str, Any]:
    """Return the part of a target's config.json that says how it is stored."""
    if variant == W4A16:
        groups = [_group(["Linear"], 4, 32)]
        ignore = ["lm_head", "re:.*vision_tower.*", "re:.*audio_tower.*", "re:.*embed_vision.*", "re:.*embed_audio.*"]
    else:
        groups = [
            _group(["re:.*embed_tokens$", "re:.*lm_head$"], 2),
            _group(["re:.*embed_tokens_per_layer$"], 2, per_layer_size),
            _group(["re:.*self_attn\\..*_proj$", "re:.*mlp\\..*_proj$"], 4, activations=True),
            _group(["re:.*per_layer_(input_gate|projection|model_projection)$"], 8, activations=True),
        ]
        ignore = []
    return {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.16.0",
    }


def _group(
    targets: list[str], bits: int, group_size: int | None = None, *, activations: bool = False
) -> dict[str, Any]:
    static = _arguments(8, "tensor", None) if activations else None
    return {
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "input_activations": static,
        "output_activations": static,
        "targets": targets,
        "weights": _arguments(bits, "group" if group_size else "channel", group_size),
    }


def _arguments(bits: int, strategy: str, group_size: int | None) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group_size,
        "num_bits": bits,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    }
