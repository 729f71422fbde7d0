"""Opening the backend that runs a bundle."""

from __future__ import annotations

from pathlib import Path

from mtp_runtime.bundle.bundle import Bundle
from mtp_runtime.errors import UserError
from mtp_runtime.generate.backend import Backend, Provider


def check_threads(threads: int) -> None:
    """Check a number of threads before a bundle is opened for it, which may take long.

    Raises:
        UserError: it is below 1.
    """
    if threads < 1:
        raise UserError(f"threads is {threads}: give 1 or more")


def open_backend(bundle: Bundle, threads: int, cache_dir: Path | None, provider: Provider) -> Backend:
    """Open the bundle's graphs with the library of its export format.

    The libraries are imported here, so that reading manifests, traces and reports loads none.

    Raises:
        UserError: the provider is not there, or not for this bundle.
        BundleError: a graph is missing or contradicts the manifest.
        BackendError: the inference library refuses a graph.
    """
    if bundle.manifest.export_format == "onnx":
        from mtp_runtime.backends.onnx.backend import OnnxBackend

        return OnnxBackend.open(bundle, threads=threads, cache_dir=cache_dir, provider=provider)
    if provider != "cpu":
        raise UserError(
            f"a {bundle.manifest.export_format} bundle runs on the cpu, not on {provider}: export it with --format onnx"
        )
    from mtp_runtime.backends.litert.backend import LiteRTGraphs
    from mtp_runtime.backends.litert.static import StaticBackend

    return StaticBackend(LiteRTGraphs.open(bundle, threads=threads, cache_dir=cache_dir), bundle.manifest)
