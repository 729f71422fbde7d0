"""How large files will be, from traced graphs and the formats of their parameters: no weight is read.

What parameters take is exact. What describes a graph is counted from the operations of its segments on the meta device:
at E2B that is 0.2 % of a `.tflite`, whose header is large because it repeats every row's scale and zero point in each
signature. It is the whole of an `.onnx`, whose weights lie beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_export.graph.ir import Segment, TracedGraph

_ALIGNMENT = 64  # of a parameter in either format
_SECTION_BYTES = 16 << 10  # alignment of a section of a .litertlm
_COMPRESSED = 0.2  # of a tokenizer.json in a .litertlm (zlib): nano's 0.17, E2B's 0.20
_SECTIONS_BESIDE_GRAPHS = 4  # the file's own header, metadata, manifest, tokenizer

# What linear layers dispatch besides their product, and views that cost nothing: no operation of a file.
_FREE = {"aten.t.default", "aten._unsafe_view.default", "aten.expand.default", "aten.clone.default"}


def litertlm_bytes(graph_sizes: Mapping[str, int], tokenizer: int, manifest: int) -> int:
    """Return the bytes of the container: every part in a section of its own, the tokenizer compressed."""
    parts = [*graph_sizes.values(), round(tokenizer * _COMPRESSED), manifest]
    sections = sum(-(-part // _SECTION_BYTES) for part in parts) + _SECTIONS_BESIDE_GRAPHS - 2
    return sections * _SECTION_BYTES


def operations_made(graph: TracedGraph, weights: Mapping[str, float]) -> dict[str, float]:
    """Return what each segment becomes in a file: an operation being one unless `weights` says otherwise."""
    by_segment = {key: _operations(segment) for key, segment in graph.segments.items()}
    return {key: sum(n * weights.get(name, 1) for name, n in counts.items()) for key, counts in by_segment.items()}


def _operations(segment: Segment) -> Counter[str]:
    """The operations that a segment consists of, by name, without what no file has."""
    with torch.no_grad(), torch.device("meta"), _Recorder() as recorder:
        segment.module(**segment.inputs)
    counts = recorder.counts
    # A linear layer flattens its input first, which its operation in a file does by itself.
    counts["aten.view.default"] -= counts["aten.mm.default"]
    return Counter({name: count for name, count in counts.items() if name not in _FREE and count > 0})


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that torch dispatches, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def padded(size: int) -> int:
    """Return a size rounded up to the alignment of a parameter."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
