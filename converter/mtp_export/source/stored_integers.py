"""Matrices that a checkpoint stores as integers: the layout of the library compressed-tensors (0.20), strictly read.

A module's matrix [R,C] lies in its file as
    pack-quantized   `weight_packed` int32 [R, C * bits / 32], each value plus half its range, the first in the lowest
                     bits; and `weight_shape`, R and C
    int-quantized    `weight` int8 [R,C]
and beside it `weight_scale`, a float for each row [R,1] or for each group of columns [R, C / group]. There are no zero
points: the kernels that run the exported matrices have none.

How wide and grouped a matrix is follows from the shapes of its tensors, and must be what a group of the config says; so
no pattern of a config, which a stranger wrote, is ever matched. Scales of activations and of a KV cache are left alone:
runtimes round activations by their own largest value, and the cache is float.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from mtp_export.errors import CheckpointError
from mtp_export.weights.recipes import SMALLEST_SCALE, WeightFormat

KEY = "quantization_config"
METHOD = "compressed-tensors"
_BITS = (2, 4, 8)
_WORD_BITS = 32
# Tensors beside a quantised matrix that say nothing of its values.
_UNREAD = ("input_scale", "output_scale")
_CONTRADICTING = ("weight_zero_point", "weight_g_idx")


class _Weights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    num_bits: int
    strategy: str
    type: str = "int"
    symmetric: bool = True
    dynamic: bool = False
    group_size: int | None = None
    block_structure: Any = None
    actorder: str | None = None
    # How the values were found, which changes nothing of what they mean.
    observer: str | None = None
    observer_kwargs: dict[str, Any] | None = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None


class _Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    targets: list[str]
    weights: _Weights | None = None
    input_activations: dict[str, Any] | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None


class _Quantization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    config_groups: dict[str, _Group]
    quant_method: str
    format: str
    quantization_status: str = "compressed"
    ignore: list[str] | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    global_compression_ratio: float | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    version: str | None = None


def read_quantization(config: Any, where: str) -> frozenset[WeightFormat]:
    """Return the formats that a config.json says matrices are stored in; none where it says nothing.

    A group's block size is its number of columns, 0 where a row has one scale.

    Raises:
        CheckpointError: matrices are stored in a way that is not read here.
    """
    stated = config.get(KEY) if isinstance(config, dict) else None
    if stated is None:
        return frozenset()
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if method != METHOD:
        raise CheckpointError(
            f"{where}: {KEY} has quant_method = {method!r}, expected {METHOD!r}: "
            "take the published checkpoint whose name ends in -ct, or one in floats"
        )
    try:
        quantization = msgspec.convert(stated, type=_Quantization)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{where}: {KEY}: {error}: this is not {METHOD} as we know it") from error
    _expect(where, "format", quantization.format, ("pack-quantized", "int-quantized", "mixed-precision"))
    _expect(where, "quantization_status", quantization.quantization_status, ("compressed", "frozen"))
    for key in ("sparsity_config", "transform_config"):
        _expect(where, key, getattr(quantization, key) or None, (None,))
    groups = {name: group for name, group in quantization.config_groups.items() if group.weights is not None}
    return frozenset(_format(f"{where}: {name}", group) for name, group in groups.items())


def _format(where: str, group: _Group) -> WeightFormat:
    weights = group.weights
    assert weights is not None
    _expect(where, "format", group.format, (None, "pack-quantized", "int-quantized"))
    _expect(where, "num_bits", weights.num_bits, _BITS)
    _expect(where, "type", weights.type, ("int",))
    _expect(where, "symmetric", weights.symmetric, (True,))
    _expect(where, "dynamic", weights.dynamic, (False,))
    _expect(where, "block_structure", weights.block_structure, (None,))
    _expect(where, "actorder", weights.actorder, (None, "weight", "static"))  # others move columns about
    _expect(where, "strategy", weights.strategy, ("channel", "group"))
    if weights.strategy == "channel":
        _expect(where, "group_size", weights.group_size, (None, -1))
        return WeightFormat(bits=weights.num_bits, block_size=0)
    if weights.group_size is None or weights.group_size < 1:
        raise CheckpointError(f"{where}: group_size is {weights.group_size!r}, expected the columns of a group")
    return WeightFormat(bits=weights.num_bits, block_size=weights.group_size)


def _expect(where: str, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        expected = " or ".join(map(repr, allowed))
        raise CheckpointError(f"{where}: {key} is {value!r}, expected {expected}: other {METHOD} files are not read")


class Rows(NamedTuple):
    """Rows as a checkpoint stores them. Shapes: values [R,C] int8, scales [R, C / group] float32, or [R,1]"""

    values: NDArray[np.int8]
    scales: NDArray[np.float32]


class Header(Protocol):
    """What the header of a file says of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """A matrix that is stored as integers, by the name that it would have in floats."""

    name: str
    shape: tuple[int, ...]
    format: WeightFormat
    packed: bool

    @property
    def values(self) -> str:
        """Name of the tensor that holds the integers."""
        return f"{_module(self.name)}.weight_packed" if self.packed else self.name

    @property
    def scales(self) -> str:
        return f"{_module(self.name)}.weight_scale"

    @property
    def stated_shape(self) -> str | None:
        """Name of the tensor that says the shape."""
        return f"{_module(self.name)}.weight_shape" if self.packed else None

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors of this matrix, read or not."""
        unread = (f"{_module(self.name)}.{suffix}" for suffix in _UNREAD)
        return frozenset(filter(None, (self.values, self.scales, self.stated_shape, *unread)))

    def rows(self, stored: NDArray[Any], scales: NDArray[np.float32]) -> Rows:
        """Return what stored rows mean: integers and scales as they are; a block whose scale is 0 is one of zeros.

        Shapes: stored [R, C * bits / 32] int32 or [R,C] int8, scales [R,G]
        """
        values = unpack(stored, self.format.bits) if self.packed else stored
        if not scales.all():
            blocks = np.where(scales[..., None] == 0, np.int8(0), values.reshape(*scales.shape, -1))
            values, scales = blocks.reshape(values.shape), np.where(scales == 0, np.float32(SMALLEST_SCALE), scales)
        return Rows(values, scales)


def unpack(words: NDArray[np.int32], bits: int) -> NDArray[np.int8]:
    """Take packed values apart. Shapes: [R,W] -> [R, W * 32 / bits]"""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)  # values never straddle a byte, and bytes are in their order
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    unsigned = octets[..., None] >> shifts & np.uint8(2**bits - 1)
    return (unsigned - np.uint8(1 << (bits - 1))).view(np.int8).reshape(len(words), -1)


def find(
    tensors: Mapping[str, Header], name: str, shape: tuple[int, ...], formats: frozenset[WeightFormat], where: str
) -> StoredMatrix | None:
    """Return the matrix `name` of this shape if it is stored as integers.

    Raises:
        CheckpointError: its tensors contradict each other, the shape, or the formats that the config names.
    """
    module = _module(name)
    packed, plain = tensors.get(f"{module}.weight_packed"), tensors.get(name)
    values = packed or (plain if plain is not None and plain.dtype == "I8" else None)
    if not formats or values is None:
        return None

    def fail(fault: str) -> CheckpointError:
        return CheckpointError(f"{where}: {module} {fault}: the checkpoint contradicts itself")

    if len(shape) != 2:
        raise fail("is a vector, and stored as integers")
    for suffix in _CONTRADICTING:
        if f"{module}.{suffix}" in tensors:
            raise fail(f"has a {suffix}, which {KEY} says nothing of")
    needed = ("weight_scale", "weight_shape") if packed else ("weight_scale",)
    for suffix in needed:
        if f"{module}.{suffix}" not in tensors:
            raise CheckpointError(f"{where}: tensor {module}.{suffix} is missing: the checkpoint is incomplete")
    rows, columns = shape
    bits = values.shape[-1] * _WORD_BITS // columns if packed else 8
    width = columns * bits // _WORD_BITS if packed else columns
    if (packed and values.dtype != "I32") or bits not in _BITS or values.shape != (rows, width):
        raise fail(f"is stored as {values.dtype} {list(values.shape)}, config.json asks for {list(shape)}")
    scales = tensors[f"{module}.weight_scale"].shape
    groups = scales[-1] if scales else 0
    if scales != (rows, groups) or not groups or columns % groups:
        raise fail(
            f"has scales {list(scales)}, expected {[rows, 1]} or so many for each row that they divide {columns}"
        )
    format = WeightFormat(bits=bits, block_size=columns // groups)
    rowwise = dataclasses.replace(format, block_size=0)
    if format not in formats and (groups > 1 or rowwise not in formats):
        listed = ", ".join(sorted(f"{f.bits} bits in {_grouping(f)}" for f in formats))
        raise fail(f"is stored at {bits} bits in groups of {columns // groups}, {KEY} names {listed}")
    return StoredMatrix(name=name, shape=shape, format=format if groups > 1 else rowwise, packed=packed is not None)


def _grouping(format: WeightFormat) -> str:
    return f"groups of {format.block_size}" if format.block_size else "rows"


def _module(name: str) -> str:
    return name.removesuffix(".weight")


# Columns of a group that a kernel multiplies, or looks up, by the bits of a value; 0 stands for a whole row.
_BLOCKS = (32, 64, 128, 256)
_TFLITE_PRODUCTS: Mapping[int, tuple[int, ...]] = {8: (0,), 4: (0, *_BLOCKS), 2: (0,)}
_TFLITE_LOOK_UPS: Mapping[int, tuple[int, ...]] = {8: (0,), 4: (0, *_BLOCKS), 2: (0, *_BLOCKS)}
_ONNX = dict.fromkeys(_BITS, (0, *_BLOCKS))


def check_runs(name: str, format: WeightFormat, export_format: str, *, looked_up: bool) -> None:
    """Check that an export format has a kernel for a matrix as it is stored.

    Raises:
        CheckpointError: it has none, and the matrix would have to be quantised anew.
    """
    known = {"tflite": _TFLITE_LOOK_UPS if looked_up else _TFLITE_PRODUCTS, "onnx": _ONNX}[export_format]
    if format.block_size not in known[format.bits]:
        raise CheckpointError(
            f"{name} is stored at {format.bits} bits in {_grouping(format)}, which {export_format} cannot "
            f"{'look up' if looked_up else 'multiply'}: take the checkpoint in floats, or another --format"
        )
