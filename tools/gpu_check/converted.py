"""Converted graphs in a folder: with what another machine left there, one with a GPU needs no converter."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mtp_export.formats.tflite import chain as tflite
from mtp_export.graph.ir import TracedGraph
from mtp_export.models.layers import Composable

_PACKAGE = Path(tflite.__file__).parents[2]
_SOURCES = ("formats/tflite/*.py", "models/*.py", "graph/*.py")


@contextlib.contextmanager
def conversions(folder: Path) -> Iterator[None]:
    """Within it, exports take converted graphs from `folder`, and leave there those that they convert."""
    convert = tflite.lower

    def lower(
        graphs: Sequence[TracedGraph], workers: int, on_segments: Callable[[int], None] = lambda count: None
    ) -> list[tflite.LoweredGraph]:
        path = folder / f"{_identity(graphs)}.xz"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lzma.compress(pickle.dumps(convert(graphs, workers, on_segments))))
        lowered: list[tflite.LoweredGraph] = pickle.loads(lzma.decompress(path.read_bytes()))
        return lowered

    tflite.lower = lower
    try:
        yield
    finally:
        tflite.lower = convert


def composed(graph: TracedGraph) -> bool:
    """Whether a graph was traced with composites."""
    parts = (part for segment in graph.segments.values() for part in segment.module.modules())
    return any(isinstance(part, Composable) and part.composites for part in parts)


def _identity(graphs: Sequence[TracedGraph]) -> str:
    """Digest of what graphs compute, whatever the versions of the libraries: their signatures and parameters, and the
    code that they are made by."""
    digest = hashlib.sha256()
    for source in sorted(path for pattern in _SOURCES for path in _PACKAGE.glob(pattern)):
        digest.update(source.read_bytes())
    described = [(graph.role, graph.signatures, sorted(graph.weights.items()), composed(graph)) for graph in graphs]
    digest.update(repr(described).encode())
    return digest.hexdigest()[:16]
