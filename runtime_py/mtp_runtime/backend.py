"""The seam of the runtime: what a `Backend` gives to the loop, whatever library runs the graphs.

A backend opens a bundle, allocates every buffer once, and hands out signatures whose inputs and outputs are already
bound. Nothing is allocated by a run; the KV caches are bound as input and output of every signature that names them,
in the target and in the drafter alike, so a row written by one is there for the other.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mtp_runtime.contract import GraphSignature
from mtp_runtime.kv_cache import KVCache

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]


class BoundSignature(Protocol):
    """One signature of one graph with its buffers allocated and bound."""

    @property
    def spec(self) -> GraphSignature:
        """Names, shapes and dtypes of the signature."""
        ...

    def write(self, name: str, values: FloatArray | IntArray) -> None:
        """Copy `values` into the input `name`; they stay there until they are written again.

        Raises:
            BackendError: the size is not the input's.
        """
        ...

    def run(self) -> None:
        """Run the graph on what was written.

        Raises:
            BackendError: the library refused.
        """
        ...

    def read(self, name: str) -> FloatArray:
        """Return a copy of the output `name` of the last run, in the signature's shape."""
        ...


class Backend(Protocol):
    """An opened bundle, ready to run. `open(bundle)` is the class method of each implementation."""

    @property
    def kv_cache(self) -> KVCache:
        """The one KV cache of this bundle, shared by the target and the drafter."""
        ...

    def bound(self, role: str, name: str) -> BoundSignature:
        """Return the signature `name` of the graph `role`, bound at the first call and the same object ever after.

        Raises:
            BundleError: the bundle has no such signature, or the graph contradicts the manifest.
        """
        ...

    def close(self) -> None:
        """Release the graphs and buffers; closing twice is harmless."""
        ...
