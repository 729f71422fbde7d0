"""ONNX Runtime's WebGPU provider, a library that it loads: sessions on a GPU, and rows of caches in its memory."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mtp_runtime.backends.onnx.errors import REFUSED
from mtp_runtime.errors import BundleError, UserError
from mtp_runtime.generate.backend import FloatArray

_INSTALL = "pip install 'mtp-export[webgpu]'"
_NO_ADAPTER = "WebGPU adapter"  # in the provider's error where Vulkan offers it no device


def open_session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """Load a graph for the GPU.

    Raises:
        UserError: what it takes is not installed, or there is no GPU.
    """
    options.add_provider_for_devices([_device()], {})
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        return ort.InferenceSession(with_whole_scales(path), options)
    except REFUSED as error:
        if _NO_ADAPTER not in str(error):
            raise
        raise UserError(f"the webgpu provider finds no GPU: install its Vulkan driver ({error})") from error


class DeviceRows:
    """Rows of a cache in the GPU's memory. Shapes: value [1, G, slots, D]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Allocate zeroed rows."""
        memory = _device().memory_info(ort.OrtDeviceMemoryType.DEFAULT)
        self.value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, memory_info=memory)
        self._store(np.zeros(shape, np.float32))

    def read(self) -> FloatArray:
        """Return a copy of all rows."""
        rows = np.empty(self.value.shape(), np.float32)
        ort.copy_tensors([self.value], [ort.OrtValue.ortvalue_from_numpy(rows)])
        return rows

    def write(self, rows: FloatArray) -> None:
        """Replace the leading rows. Shapes: rows [1, G, n, D]."""
        whole = self.read()
        whole[:, :, : rows.shape[2]] = rows
        self._store(whole)

    def _store(self, rows: FloatArray) -> None:
        ort.copy_tensors([ort.OrtValue.ortvalue_from_numpy(rows)], [self.value])


@functools.cache
def _device() -> Any:
    """Return the device that sessions run on: a library is registered once in a process."""
    return find_device()


def find_device(package: str = "onnxruntime_ep_webgpu") -> Any:
    """Register the provider's library, which `package` has, and return the GPU that it offers.

    Raises:
        UserError: the package is not installed, its library does not load, or there is no GPU.
    """
    try:
        plugin = importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"the webgpu provider is not installed ({error}): {_INSTALL}") from error
    try:
        ort.register_execution_provider_library("webgpu", plugin.get_library_path())
    except REFUSED as error:
        raise UserError(f"the webgpu provider does not load: install libvulkan1, and {_INSTALL} ({error})") from error
    devices = [device for device in ort.get_ep_devices() if device.ep_name == plugin.get_ep_name()]
    if not devices:
        ort.unregister_execution_provider_library("webgpu")
        raise UserError(
            "ONNX Runtime sees no GPU on this machine: install its driver; in a container that hides it, or for a "
            "Vulkan driver in software, set ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1"
        )
    return devices[0]


def with_whole_scales(path: Path) -> bytes:
    """Return a graph in which each norm has a scale for every element.

    The provider refuses one scale for all elements. The CPU takes it, and the export writes it for norms without
    weights.

    Raises:
        UserError: onnx is not installed.
        BundleError: the file is no ONNX model.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise UserError(f"the webgpu provider needs onnx ({error}): {_INSTALL}") from error
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(f"{path.name} is a damaged ONNX model ({type(error).__name__}): export it again") from error
    single = {tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [1]}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "RMSNormalization" and node.input[1] in single:
            size, scale = f"{node.output[0]}/size", f"{node.output[0]}/scale"
            nodes.append(onnx.helper.make_node("Shape", [node.input[0]], [size], name=size, start=-1))
            nodes.append(onnx.helper.make_node("Expand", [node.input[1], size], [scale], name=scale))
            node.input[1] = scale
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    written: bytes = model.SerializeToString()
    return written
