"""The memory that the graphs of an ONNX bundle are bound to, and a KV cache for each sequence.

What makes the caches work in place (measured with onnxruntime 1.32): GroupQueryAttention writes its rows into the
buffer that is bound as past and as present. With a buffer apart for the present it copies the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from mtp_runtime.backends.onnx.pooled_cache import CacheRows, PooledKVCache
from mtp_runtime.bundle.context import sliding_window
from mtp_runtime.bundle.contract import (
    BATCH_ROLES,
    GRAPH_ROLES,
    CacheName,
    GraphSignature,
    Manifest,
    TensorSpec,
    cache_of_output,
    for_sequences,
    of_sequence,
    output_name,
)
from mtp_runtime.generate.backend import FloatArray

# Of one sequence in a pass: enough to use the cores, few enough for the buffers of sliding layers. It is the same for a
# sequence alone and among others, because attention rounds otherwise over another number of tokens.
PREFILL_TOKENS = 256
CPU = "cpu"


class BoundRows(CacheRows, Protocol):
    """Rows of a cache that are bound to graphs as `value`."""

    value: ort.OrtValue


class HostRows:
    """Rows of a cache in the CPU's memory. Shapes: value [1, G, slots, D]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Allocate zeroed rows."""
        self._memory = np.zeros(shape, np.float32)
        self.value = shared(self._memory)

    def read(self) -> FloatArray:
        """Return all rows, the very memory."""
        return self._memory

    def write(self, rows: FloatArray) -> None:
        """Replace the leading rows. Shapes: rows [1, G, n, D]."""
        self._memory[:, :, : rows.shape[2]] = rows


class GraphBuffers:
    """The buffers of every graph input and output, for `sequences` sequences.

    A sequence without a part in a pass is not touched by it: buffers of one row that nobody reads take its place.
    """

    def __init__(
        self, manifest: Manifest, sequences: int, new_rows: Callable[[tuple[int, ...]], BoundRows] = HostRows
    ) -> None:
        """Allocate the caches; `new_rows` makes zeroed rows of a cache where the graphs run."""
        self.sequences = sequences
        self._manifest = manifest
        self._new_rows = new_rows
        self._specs = signatures(manifest, sequences)
        verified = sequences * max(manifest.num_draft_tokens + 1, 2)
        self._sizes = {"batch": sequences, "tokens": max(sequences * PREFILL_TOKENS, verified), "rows": verified}
        self._memory: dict[str, Any] = {}
        self._own: tuple[dict[str, ort.OrtValue], ...] = tuple({} for _ in range(sequences))
        self._nobody: dict[str, ort.OrtValue] = {}
        self.caches = tuple(self._new_cache(i) for i in range(sequences))

    @property
    def cache_values(self) -> tuple[Mapping[str, ort.OrtValue], ...]:
        """The very objects that every pass binds, by the name of the cache tensor, of each sequence."""
        return tuple({n: value for n, value in own.items() if CacheName.in_name(n)} for own in self._own)

    def prepare(self, sequence: int, count: int) -> None:
        """Make room for `count` tokens of a sequence, and set how full its pools will be for the graphs.

        Raises:
            ContextFullError: they do not fit.
        """
        cache = self.caches[sequence]
        cache.settle(count)
        total = cache.filled_length + count
        for pool, rows in (("full", total), ("sliding", total - cache.first_position)):
            self._own[sequence][f"{pool}_last"].numpy()[0] = rows - 1
            self._own[sequence][f"{pool}_total"].numpy()[...] = rows

    def inputs(self, role: str, sizes: Mapping[str, int], sequences: Collection[int]) -> dict[str, ort.OrtValue]:
        """Return the buffer of every input of a graph, for a pass of some sequences.

        `sizes` are those of the axes that vary: batch, tokens, rows.
        """
        return {
            spec.name: self._own_buffer(spec.name, sequences) or self._buffer(f"{role}/{spec.name}", spec, sizes)
            for spec in self._specs[role].inputs
        }

    def outputs(self, role: str, sizes: Mapping[str, int], sequences: Collection[int]) -> dict[str, ort.OrtValue]:
        """Return the buffer of every output of a graph, as `inputs` does.

        A cache goes out where it came in, for the layers that only read one too: a present apart from the past is a
        copy.
        """
        buffers = {}
        for spec in self._specs[role].outputs:
            cache = cache_of_output(spec.name)
            own = None if cache is None else self._own_buffer(cache, sequences)
            buffers[output_name(spec.name)] = own or self._buffer(f"{role}/{spec.name}", spec, sizes)
        return buffers

    def output_spec(self, role: str, name: str) -> TensorSpec:
        """Return an output of a graph by its name."""
        return next(spec for spec in self._specs[role].outputs if spec.name == name)

    def _own_buffer(self, name: str, sequences: Collection[int]) -> ort.OrtValue | None:
        """Return what belongs to one sequence: a cache, or how full it is."""
        for i, own in enumerate(self._own):
            if self.sequences > 1:
                own = {of_sequence(n, i): value for n, value in (own if i in sequences else self._nobody).items()}
            if name in own:
                return own[name]
        return None

    def _buffer(self, name: str, spec: TensorSpec, sizes: Mapping[str, int]) -> ort.OrtValue:
        """Return memory that all passes of one kind share, whatever their sizes: the beginning of one array."""
        if name not in self._memory:
            self._memory[name] = np.zeros(math.prod(sized(spec.shape, self._sizes)), np.dtype(spec.dtype))
        shape = sized(spec.shape, sizes)
        return shared(self._memory[name][: math.prod(shape)].reshape(shape))

    def _new_cache(self, sequence: int) -> PooledKVCache:
        manifest = self._manifest
        for pool in ("full", "sliding"):
            for own in (self._own[sequence], self._nobody):
                own[f"{pool}_last"] = shared(np.zeros(1, np.int32))
                own[f"{pool}_total"] = shared(np.ones((), np.int32))
        caches = [spec for spec in manifest.signatures["target"][0].inputs if spec.is_cache]
        longest = max(PREFILL_TOKENS, manifest.num_draft_tokens + 1)
        allocate = functools.partial(self._allocate, sequence)
        return PooledKVCache(caches, manifest.cache_length, sliding_window(manifest), longest, allocate)

    def _allocate(self, sequence: int, name: str, shape: tuple[int, ...]) -> CacheRows:
        batch, groups, _, size = shape
        rows = self._new_rows(shape)
        self._own[sequence][name] = rows.value
        self._nobody[name] = self._new_rows((batch, groups, 1, size)).value
        return rows


def signatures(manifest: Manifest, sequences: int) -> dict[str, GraphSignature]:
    """Return the signature of each graph that `sequences` sequences need, by role."""
    single = {role: manifest.signatures[role][0] for role in GRAPH_ROLES}
    if sequences == 1:
        return single
    return single | {role: for_sequences(single[role], sequences) for role in BATCH_ROLES}


def shared(array: Any) -> ort.OrtValue:
    """Return a value on the memory of `array`: what is written to one is in the other."""
    return ort.OrtValue.ortvalue_from_numpy(array, CPU)


def sized(shape: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a shape with its named axes replaced by their `sizes`."""
    return tuple(size if isinstance(size, int) else sizes[size] for size in shape)
