"""Graphs run one by one in the LiteRT that is part of LiteRT-LM, by its C interface.

The `ai-edge-litert` wheel ends on a composite on a GPU (docs/tried.md); this library has the kernels that bundles run
with. The declarations are those of LiteRT's headers at the version that `pyproject.toml` pins: they are no stable
interface.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator, Mapping
from ctypes import byref, c_bool, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import litert_lm
import numpy as np
from numpy.typing import NDArray

from mtp_runtime.bundle.contract import PARAM_TENSOR, CacheName

_GPU = 2  # LiteRtHwAccelerators
_PRECISIONS = {"fp16": 1, "fp32": 2}
_READ, _WRITE = 0, 1  # LiteRtTensorBufferLockMode
_ACTIVE_WAIT = 2
_DTYPES = {1: np.dtype(np.float32), 2: np.dtype(np.int32)}  # by LiteRtElementType
# Tensors that the delegate takes as they lie in memory, as LiteRT-LM has it for the caches.
_AS_THEY_LIE = (CacheName.PREFIX.encode(), PARAM_TENSOR.encode())


class _Layout(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_uint, 7),
        ("has_strides", ctypes.c_uint, 1),
        ("dimensions", ctypes.c_int32 * 8),
        ("strides", ctypes.c_uint32 * 8),
    )


class _TensorType(ctypes.Structure):
    _fields_ = (("element_type", c_int), ("layout", _Layout))


class StockGraph:
    """A graph compiled for the GPU, with one buffer for each tensor of each signature; a cache is one buffer, bound as
    input and as output."""

    def __init__(self, path: Path, activations: str) -> None:
        """Load the graph with activations in fp32 or fp16, all signatures over one copy of the weights.

        Raises:
            RuntimeError: the library refuses, or leaves a part of the graph to the CPU.
        """
        self._library = ctypes.CDLL(str(Path(litert_lm.__file__).parent / "liblitert-lm.so"))
        self._environment = self._made("LiteRtCreateEnvironment", c_int(0), None)
        self._model = self._made("LiteRtCreateModelFromFile", self._environment, str(path).encode())
        self._compiled = self._made(
            "LiteRtCreateCompiledModel", self._environment, self._model, self._options(activations)
        )
        whole = c_bool()
        self._call("LiteRtCompiledModelIsFullyAccelerated", self._compiled, byref(whole))
        if not whole.value:
            raise RuntimeError(f"{path.name} is not wholly delegated")
        count = c_size_t()
        self._call("LiteRtGetNumModelSignatures", self._model, byref(count))
        self._signatures = [self._made("LiteRtGetModelSignature", self._model, c_size_t(i)) for i in range(count.value)]

    def signature(self, name: str) -> StockSignature:
        """Return a signature with its buffers."""
        names = [self._text("LiteRtGetSignatureKey", signature) for signature in self._signatures]
        return StockSignature(self, names.index(name))

    def _options(self, activations: str) -> c_void_p:
        gpu = self._made("LrtCreateGpuOptions")
        precision = c_int(_PRECISIONS[activations])
        self._call("LrtSetGpuAcceleratorCompilationOptionsPrecision", gpu, precision)
        for pattern in _AS_THEY_LIE:
            self._call("LrtAddGpuOptionsExternalTensorPattern", gpu, pattern)
            self._call("LrtAddGpuOptionsBufferStorageTensorPattern", gpu, pattern)
        self._call("LrtSetGpuOptionsConstantTensorsSharing", gpu, c_bool(True))
        self._call("LrtSetGpuOptionsInfiniteFloatCapping", gpu, c_bool(True))
        self._call("LrtSetGpuOptionsHintFullyDelegatedToSingleDelegate", gpu, c_bool(True))
        self._call("LrtSetGpuAcceleratorRuntimeOptionsNumStepsOfCommandBufferPreparations", gpu, c_int(2))
        self._call("LrtSetGpuAcceleratorRuntimeOptionsNumThreadsToUpload", gpu, c_int(2))
        self._call("LrtSetGpuAcceleratorRuntimeOptionsWaitType", gpu, c_int(_ACTIVE_WAIT))
        identifier, payload, deleter = c_char_p(), c_void_p(), c_void_p()
        self._call("LrtGetOpaqueGpuOptionsData", gpu, byref(identifier), byref(payload), byref(deleter))
        options = self._made("LiteRtCreateOptions")
        self._call("LiteRtSetOptionsHardwareAccelerators", options, c_int(_GPU))
        opaque = self._made("LiteRtCreateOpaqueOptions", identifier, payload, deleter)
        self._call("LiteRtAddOpaqueOptions", options, opaque)
        return options

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise RuntimeError(f"{function} says {status}")

    def _made(self, function: str, *arguments: Any) -> c_void_p:
        """Return what a function puts behind its last argument."""
        made = c_void_p()
        self._call(function, *arguments, byref(made))
        return made

    def _text(self, function: str, *arguments: Any) -> str:
        text = c_char_p()
        self._call(function, *arguments, byref(text))
        return (text.value or b"").decode()


class StockSignature:
    """One signature, bound."""

    def __init__(self, graph: StockGraph, index: int) -> None:
        """Make the buffers of signature number `index`."""
        self._graph, self._index = graph, c_size_t(index)
        self._buffers: dict[str, c_void_p] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self.inputs, self.outputs = self._bind("Input"), self._bind("Output")
        self._bound = [(c_void_p * len(n))(*[self._buffers[i] for i in n]) for n in (self.inputs, self.outputs)]

    def _bind(self, kind: str) -> list[str]:
        graph, signature = self._graph, self._graph._signatures[self._index.value]
        count = c_size_t()
        graph._call(f"LiteRtGetNumSignature{kind}s", signature, byref(count))
        names = [
            graph._text(f"LiteRtGetSignature{kind}Name", signature, c_size_t(number)) for number in range(count.value)
        ]
        for number, name in enumerate(names):
            if name in self._buffers:
                continue
            tensor_type = _TensorType()
            tensor = graph._made(f"LiteRtGetSignature{kind}Tensor", signature, name.encode())
            graph._call("LiteRtGetRankedTensorType", tensor, byref(tensor_type))
            requirements = graph._made(
                f"LiteRtGetCompiledModel{kind}BufferRequirements", graph._compiled, self._index, c_size_t(number)
            )
            self.shapes[name] = tuple(tensor_type.layout.dimensions[: tensor_type.layout.rank])
            self._dtypes[name] = _DTYPES[tensor_type.element_type]
            self._buffers[name] = graph._made(
                "LiteRtCreateManagedTensorBufferFromRequirements", graph._environment, byref(tensor_type), requirements
            )
        return names

    def write(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Copy values into inputs; they stay there."""
        for name, array in values.items():
            whole = np.ascontiguousarray(array, self._dtypes[name])
            if whole.size != math.prod(self.shapes[name]):
                raise ValueError(f"{name} takes {self.shapes[name]}, got {whole.shape}")
            with self._locked(name, _WRITE) as address:
                ctypes.memmove(address, whole.ctypes.data, whole.nbytes)

    def run(self) -> None:
        """Start the graph on what was written; reading an output waits for it."""
        counts = [c_size_t(len(names)) for names in (self.inputs, self.outputs)]
        ins, outs = self._bound
        self._graph._call("LiteRtRunCompiledModel", self._graph._compiled, self._index, counts[0], ins, counts[1], outs)

    def read(self, name: str) -> NDArray[np.float32]:
        """Return a copy of an output."""
        values = np.empty(self.shapes[name], np.float32)
        with self._locked(name, _READ) as address:
            ctypes.memmove(values.ctypes.data, address, values.nbytes)
        return values

    @contextlib.contextmanager
    def _locked(self, name: str, mode: int) -> Iterator[c_void_p]:
        buffer, address = self._buffers[name], c_void_p()
        self._graph._call("LiteRtLockTensorBuffer", buffer, byref(address), c_int(mode))
        yield address
        self._graph._call("LiteRtUnlockTensorBuffer", buffer)
