"""What onnxruntime raises when it refuses something."""

from __future__ import annotations

from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

# What pybind raises, and onnxruntime's own errors, which have no base in common but Exception.
REFUSED: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(kind for kind in vars(ort_errors).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)
