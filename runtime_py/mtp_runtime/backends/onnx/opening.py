"""Opening the graphs of an ONNX bundle: onto the process's one thread pool, from packed weights where there are any.

Two sessions with pools of their own spin against each other, so all sessions share the process-wide one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Protocol

import onnxruntime as ort

from mtp_runtime.backends.onnx.errors import REFUSED
from mtp_runtime.backends.packed_weights import PackedWeights
from mtp_runtime.bundle.contract import GraphSignature, output_name
from mtp_runtime.errors import BundleError

CPU_PROVIDER = "CPUExecutionProvider"
_DTYPES = {"tensor(float)": "float32", "tensor(int32)": "int32"}
_ERRORS_ONLY = 3
# A full disk, a damaged file, or no memory left to write one.
_NO_PACKED_WEIGHTS: tuple[type[Exception], ...] = (OSError, MemoryError, *REFUSED)
_pools: list[int] = []  # the one that was made, if any: it cannot be made twice, nor change its size


class GraphOpener(Protocol):
    """Loads a graph for the CPU; `open_graph` is the one that a bundle is opened with."""

    def __call__(self, path: Path, threads: int, packed: PackedWeights | None = None) -> ort.InferenceSession:
        """Return a session on the graph at `path`."""
        ...


def open_graph(path: Path, threads: int, packed: PackedWeights | None = None) -> ort.InferenceSession:
    """Load a graph for the CPU, onto the process's one thread pool.

    With `packed` the graph is loaded from its packed weights, which are written first where they are new.
    """
    if packed is not None and packed.path is not None:
        try:
            if packed.is_new:
                _write_packed(path, threads, packed.path)
                packed.keep()
            options = pooled_options(threads)
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is optimised
            return open_session(packed.path / path.name, options)
        except _NO_PACKED_WEIGHTS as error:
            warnings.warn(f"no packed weights of {path.name}, it starts more slowly: {error}", stacklevel=2)
            if not packed.is_new:
                packed.remove()
        finally:
            packed.discard()
    return open_session(path, pooled_options(threads))


def open_session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """Load a graph for the CPU."""
    return ort.InferenceSession(str(path), options, providers=[CPU_PROVIDER])


def pooled_options(threads: int) -> ort.SessionOptions:
    """Return options of a session on the process's one thread pool, whose first user sizes it.

    Once the pool is there, ONNX Runtime refuses sessions with pools of their own.
    """
    if not _pools:
        ort.set_global_thread_pool_sizes(threads, 1)
        _pools.append(threads)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = _ERRORS_ONLY
    return options


def check_graph(session: ort.InferenceSession, role: str, spec: GraphSignature) -> None:
    """Check that a graph has the signature `spec`, tensor by tensor.

    Raises:
        BundleError: the graph contradicts the manifest.
    """
    for stated, details, name_of in (
        (spec.inputs, session.get_inputs(), str),
        (spec.outputs, session.get_outputs(), output_name),
    ):
        in_manifest = {name_of(t.name): (t.dtype, list(t.shape)) for t in stated}
        in_graph = {t.name: (_DTYPES.get(t.type, t.type), list(t.shape)) for t in details}
        for name in sorted(in_manifest.keys() | in_graph.keys()):
            if in_manifest.get(name) != in_graph.get(name):
                raise BundleError(
                    f"{role} {spec.name}: {name} is {in_graph.get(name, 'absent')} in the graph and "
                    f"{in_manifest.get(name, 'absent')} in the manifest: export the bundle again"
                )


def _write_packed(path: Path, threads: int, folder: Path) -> None:
    """Write a graph as it was optimised for this processor, with its packed weights, to a new folder."""
    folder.mkdir()
    options = pooled_options(threads)
    options.optimized_model_filepath = str(folder / path.name)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{path.name}.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    open_session(path, options)
