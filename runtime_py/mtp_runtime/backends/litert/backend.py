"""The LiteRT backend: CompiledModels of one environment over one set of cache buffers.

What makes the caches work in place (measured with ai-edge-litert 2.3.0): a buffer of `create_input_buffer_by_name` can
be bound as input and as output of the same run, and in other signatures and models of the same environment; the graph's
DYNAMIC_UPDATE_SLICE then writes its rows straight into it. A separate output buffer costs a copy of the cache. In a
bundle for a GPU it is a part of a composite, whose inputs and outputs are copied.

Where the context is chosen, inputs are resized. Until a signature ran, the library holds its outputs to be as long as
they were exported, and refuses a cache's buffer for them: its first run has other buffers, and they are copied.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, Environment, HardwareAccelerator, Options
from ai_edge_litert.tensor_buffer import TensorBuffer
from numpy.typing import NDArray

from mtp_runtime.backends.litert.quiet import hold_back_native_log_at_exit, native_log_held_back
from mtp_runtime.backends.packed_weights import LITERT, PackedWeights, default_folder
from mtp_runtime.bundle.bundle import Bundle
from mtp_runtime.bundle.context import cache_places, sliding_window
from mtp_runtime.bundle.contract import GRAPH_ROLES, GraphSignature, Manifest
from mtp_runtime.errors import BackendError, BundleError, MtpError
from mtp_runtime.generate.backend import FloatArray, IntArray
from mtp_runtime.generate.kv_cache import Rings, StaticKVCache


class LiteRTCacheBuffer:
    """A cache tensor's memory: the very object that every signature binds."""

    def __init__(self, buffer: TensorBuffer, size: int) -> None:
        """Take a buffer of `size` float32 elements."""
        self.buffer = buffer
        self._size = size

    def write(self, values: NDArray[np.float32]) -> None:
        """Copy `values`, of the buffer's whole size, into it."""
        self.buffer.write(values)

    def read(self) -> NDArray[np.float32]:
        """Return a flat copy of the whole buffer."""
        values: NDArray[np.float32] = self.buffer.read(self._size, np.float32)
        return values


class LiteRTSignature:
    """A signature with one buffer per tensor; caches are those of the bundle's KVCache."""

    def __init__(
        self,
        model: CompiledModel,
        spec: GraphSignature,
        caches: Mapping[str, TensorBuffer],
        resized: Collection[str] = (),
    ) -> None:
        """Create the buffers of `spec` on `model` and bind `caches` to the tensors of their names; those `resized` have
        another length than the graph was exported with."""
        self.spec = spec
        self._model: CompiledModel | None = model
        self._index = model.get_signature_index(spec.name)
        self._inputs = {
            tensor.name: caches.get(tensor.name) or model.create_input_buffer_by_name(spec.name, tensor.name)
            for tensor in spec.inputs
        }
        self._outputs = {
            tensor.name: caches.get(tensor.name) or model.create_output_buffer_by_name(spec.name, tensor.name)
            for tensor in spec.outputs
        }
        # Running by index is some 5 µs cheaper than by name; the lists are in the order of the graph's own signature.
        order = model.get_signature_by_index(self._index)
        self._input_list = [self._inputs[name] for name in order["inputs"]]
        self._output_names = tuple(order["outputs"])
        self._output_list = [self._outputs[name] for name in self._output_names]
        self._to_be_copied = [tensor.name for tensor in spec.outputs if tensor.name in resized]
        self._input_sizes = {tensor.name: math.prod(tensor.fixed_shape) for tensor in spec.inputs}
        for tensor in spec.inputs:
            if tensor.name not in caches:
                # New memory holds anything, and a graph run on a wild position reads outside its tensors.
                self._inputs[tensor.name].write(np.zeros(tensor.fixed_shape, np.dtype(tensor.dtype)))
        self._output_shapes = {tensor.name: tensor.fixed_shape for tensor in spec.outputs}
        self._output_sizes = {tensor.name: math.prod(tensor.fixed_shape) for tensor in spec.outputs}

    def release(self) -> None:
        """Let go of the model and the buffers; nothing can be run afterwards."""
        self._inputs, self._outputs, self._input_list, self._output_list = {}, {}, [], []
        self._model = None

    def binds(self, name: str) -> tuple[TensorBuffer | None, TensorBuffer | None]:
        """Return the buffers bound to the input and to the output `name`, None where there is none."""
        return self._inputs.get(name), self._outputs.get(name)

    def write(self, name: str, values: FloatArray | IntArray) -> None:
        """Copy `values` into the input `name`; they stay there until they are written again."""
        if values.size != self._input_sizes[name]:
            raise BackendError(f"{self.spec.name}: {name} takes {self._input_sizes[name]} values, got {values.size}")
        self._inputs[name].write(values)

    def run(self) -> None:
        """Run the graph on what was written."""
        if self._model is None:
            raise BackendError(f"{self.spec.name} cannot run: its bundle is closed")
        try:
            if self._to_be_copied:
                self._run_first(self._model)
            else:
                self._model.run_by_index(self._index, self._input_list, self._output_list)
        except RuntimeError as error:
            raise BackendError(f"LiteRT failed to run {self.spec.name}: {error}") from error

    def _run_first(self, model: CompiledModel) -> None:
        """Run with other buffers for the outputs of resized caches, and copy them into the caches."""
        written = {name: model.create_output_buffer_by_name(self.spec.name, name) for name in self._to_be_copied}
        outputs = self._outputs | written
        model.run_by_index(self._index, self._input_list, [outputs[name] for name in self._output_names])
        for name, buffer in written.items():
            self._outputs[name].write(buffer.read(self._output_sizes[name], np.float32))
        self._to_be_copied = []

    def read(self, name: str) -> FloatArray:
        """Return a copy of the output `name` of the last run, in the signature's shape."""
        values: FloatArray = self._outputs[name].read(self._output_sizes[name], np.float32)
        return values.reshape(self._output_shapes[name])


class LiteRTGraphs:
    """The graphs of a bundle, compiled for the CPU."""

    def __init__(self, bundle: Bundle, environment: Environment, models: Mapping[str, CompiledModel]) -> None:
        """Take compiled `models` by role; use `open`."""
        self._bundle = bundle
        self._environment: Environment | None = environment
        self._models = dict(models)
        self._bound: dict[tuple[str, str], LiteRTSignature] = {}
        manifest = bundle.manifest
        decode = manifest.signature("target", "decode")
        specs = [tensor for tensor in decode.inputs if tensor.is_cache]
        exported = {tensor.name: tensor.shape for tensor in bundle.exported.signature("target", "decode").inputs}
        self._resized = frozenset(spec.name for spec in specs if spec.shape != exported[spec.name])
        self._caches = {
            spec.name: models["target"].create_input_buffer_by_name(decode.name, spec.name) for spec in specs
        }
        buffers = {spec.name: LiteRTCacheBuffer(self._caches[spec.name], math.prod(spec.fixed_shape)) for spec in specs}
        places = cache_places(bundle.exported)
        self._kv_cache = StaticKVCache(
            specs,
            buffers,
            manifest.cache_length,
            slots_last=[name for name, place in places.items() if place.slot_axis == 3],
            rings=_rings(manifest, [name for name, place in places.items() if place.is_ring]),
        )

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int = 2, cache_dir: Path | None = None) -> LiteRTGraphs:
        """Compile the bundle's graphs for `threads` CPU threads and allocate the KV cache.

        Packed weights are kept in `cache_dir`, by default `packed_weights.default_folder()`.

        Raises:
            BundleError: a graph is missing or contradicts the manifest.
            BackendError: LiteRT refuses a graph.
        """
        hold_back_native_log_at_exit()
        failure: MtpError
        with native_log_held_back() as log:
            try:
                return cls._open(bundle, threads, cache_dir or default_folder())
            except RuntimeError as error:
                failure = BackendError(f"LiteRT refuses the bundle: {error} {log.last_error()}".strip())
            except MtpError as error:
                # With the traceback go the frames that hold what was half opened, while the log is still held back.
                failure = error.with_traceback(None)
        raise failure

    @classmethod
    def _open(cls, bundle: Bundle, threads: int, cache_dir: Path) -> LiteRTGraphs:
        environment = Environment.create()
        packed = {role: PackedWeights(cache_dir, LITERT, bundle.manifest.files[role]) for role in GRAPH_ROLES}
        try:
            models = {
                role: CompiledModel.from_file(
                    str(bundle.path(role)), environment=environment, options=_options(threads, packed[role].path)
                )
                for role in GRAPH_ROLES
            }
            for weights in packed.values():
                weights.keep()
        finally:
            for weights in packed.values():
                weights.discard()
        for role, model in models.items():
            _resize(model, role, bundle)
        backend = cls(bundle, environment, models)
        for role in GRAPH_ROLES:
            for spec in bundle.manifest.signatures[role]:
                backend.bound(role, spec.name)
        return backend

    @property
    def kv_cache(self) -> StaticKVCache:
        """The one KV cache of this bundle, shared by the target and the drafter."""
        return self._kv_cache

    def bound(self, role: str, name: str) -> LiteRTSignature:
        """Return the signature `name` of the graph `role`, bound at the first call and the same object ever after."""
        signature = self._bound.get((role, name))
        if signature is None:
            if not self._models:
                raise BackendError(f"cannot bind {name}: the bundle is closed")
            spec = self._bundle.manifest.signature(role, name)
            signature = LiteRTSignature(self._models[role], spec, self._caches, self._resized)
            self._bound[role, name] = signature
        return signature

    def close(self) -> None:
        """Release the graphs and buffers; closing twice is harmless."""
        # The order matters to the library: a buffer must not outlive its environment, nor a model its own. Dropping
        # the references lets it happen in that order.
        with native_log_held_back():
            self._kv_cache.release()
            for signature in self._bound.values():
                signature.release()
            self._bound.clear()
            self._caches.clear()
            self._models.clear()
            self._environment = None


def _options(threads: int, packed_weights: Path | None) -> Options:
    cpu = CpuOptions(num_threads=threads, xnnpack_weight_cache_path=str(packed_weights or ""))
    return Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu)


def _rings(manifest: Manifest, names: Sequence[str]) -> Rings | None:
    """Return the rings of the caches `names`. Before a position the drafter reads one more than the window, the target
    one less.

    Raises:
        BundleError: the manifest has no window.
    """
    if not names:
        return None
    return Rings(frozenset(names), manifest.ring_length, sliding_window(manifest) + 1)


def _resize(model: CompiledModel, role: str, bundle: Bundle) -> None:
    """Give the inputs of a graph's signatures the shapes of the context that was chosen.

    Raises:
        BundleError: the graph contradicts the manifest.
    """
    for spec in bundle.manifest.signatures[role]:
        exported = bundle.exported.signature(role, spec.name)
        _check_graph(model, role, exported)
        for tensor, before in zip(spec.inputs, exported.inputs, strict=True):
            if tensor.shape != before.shape:
                model.resize_input_tensor_by_name(spec.name, tensor.name, tensor.fixed_shape, strict=False)


def _check_graph(model: CompiledModel, role: str, spec: GraphSignature) -> None:
    """Check that `model` has the signature `spec`, tensor by tensor.

    Raises:
        BundleError: the graph contradicts the manifest.
    """
    if spec.name not in model.get_signature_list():
        raise BundleError(
            f"the {role} graph has no signature {spec.name!r}, the manifest says it does: export it again"
        )
    for stated, details in (
        (spec.inputs, model.get_input_tensor_details(spec.name)),
        (spec.outputs, model.get_output_tensor_details(spec.name)),
    ):
        in_manifest = {tensor.name: (tensor.dtype, list(tensor.fixed_shape)) for tensor in stated}
        in_graph = {name: (tensor["dtype"], list(tensor["shape"])) for name, tensor in details.items()}
        for name in sorted(in_manifest.keys() | in_graph.keys()):
            if in_manifest.get(name) != in_graph.get(name):
                raise BundleError(
                    f"{role} {spec.name}: {name} is {in_graph.get(name, 'absent')} in the graph and "
                    f"{in_manifest.get(name, 'absent')} in the manifest: export the bundle again"
                )
