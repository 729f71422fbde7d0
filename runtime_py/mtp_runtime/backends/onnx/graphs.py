"""The graphs of an ONNX bundle, for one sequence or several, and their buffers.

What makes it in place (measured with onnxruntime 1.32): GroupQueryAttention writes its rows into the buffer that is
bound as past and as present; with a buffer apart for the present it copies the cache. Two sessions with pools of
their own spin against each other, so all share the process-wide one.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np
import onnxruntime as ort

from mtp_runtime.backends.onnx import webgpu as onnx_webgpu
from mtp_runtime.backends.onnx.errors import REFUSED
from mtp_runtime.backends.onnx.pooled_cache import CacheRows, PooledKVCache
from mtp_runtime.backends.packed_weights import ONNX_RUNTIME, PackedWeights, default_folder
from mtp_runtime.bundle.bundle import Bundle
from mtp_runtime.bundle.contract import (
    BATCH_ROLES,
    GRAPH_ROLES,
    ROW_COUNTS,
    TOKEN_COUNTS,
    CacheName,
    GraphSignature,
    Manifest,
    TensorSpec,
    batch_role,
    cache_of_output,
    for_sequences,
    of_sequence,
    output_name,
)
from mtp_runtime.errors import BackendError, BundleError, UserError
from mtp_runtime.generate.backend import Draft, FloatArray, Provider, TargetPass

# Of one sequence in a pass: enough to use the cores, few enough for the buffers of sliding layers. It is the same for a
# sequence alone and among others, because attention rounds otherwise over another number of tokens.
PREFILL_TOKENS = 256
_MOST_BINDINGS = 64  # kept, by the numbers of tokens of their passes
_DTYPES = {"tensor(float)": "float32", "tensor(int32)": "int32"}
_ERRORS_ONLY = 3
# A full disk, a damaged file, or no memory left to write one.
_NO_PACKED_WEIGHTS: tuple[type[Exception], ...] = (OSError, MemoryError, *REFUSED)
_CPU, _CPU_PROVIDER = "cpu", "CPUExecutionProvider"


class TargetPiece(NamedTuple):
    """Tokens of one sequence in a pass of the target; of the last `logit_rows` of them it says what comes next."""

    token_ids: tuple[int, ...]
    logit_rows: int


class DraftStep(NamedTuple):
    """One sequence's part in a pass of the drafter. Shapes: activations [H]."""

    token_id: int
    activations: FloatArray
    with_candidates: bool


class OnnxGraphs:
    """The opened graphs, and a cache for each of `sequences`.

    A sequence without a part in a pass is not touched by it: buffers of one row that nobody reads take its place.
    """

    def __init__(
        self,
        manifest: Manifest,
        sessions: Mapping[str, ort.InferenceSession],
        sequences: int,
        new_rows: Callable[[tuple[int, ...]], BoundRows],
    ) -> None:
        """Take opened `sessions` by role, and what makes zeroed rows of a cache where they run; use `open`."""
        self._new_rows = new_rows
        self._manifest = manifest
        self._sessions = dict(sessions)
        self._sequences = sequences
        self._specs = _signatures(manifest, sequences)
        verified = sequences * max(manifest.num_draft_tokens + 1, 2)
        self._sizes = {"batch": sequences, "tokens": max(sequences * PREFILL_TOKENS, verified), "rows": verified}
        self._memory: dict[str, Any] = {}
        self._own: tuple[dict[str, ort.OrtValue], ...] = tuple({} for _ in range(sequences))
        self._nobody: dict[str, ort.OrtValue] = {}
        self.caches = tuple(self._new_cache(i) for i in range(sequences))
        self._bound: OrderedDict[object, Any] = OrderedDict()
        self.embed_ms = 0.0

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        threads: int,
        sequences: int = 1,
        cache_dir: Path | None = None,
        provider: Provider = "cpu",
    ) -> OnnxGraphs:
        """Load the bundle's graphs and allocate the caches. The thread pool is the process's: its first user sizes it.
        Packed weights are kept in `cache_dir`, by default `packed_weights.default_folder()`.

        With "webgpu" the graphs that attend run on the GPU, and the caches are in its memory. What looks rows up stays
        on the CPU, which maps the tables.

        Raises:
            UserError: the provider is not there.
            BundleError: a graph is missing or contradicts the manifest.
            BackendError: ONNX Runtime refuses a graph.
        """
        if provider not in get_args(Provider):
            raise UserError(f"there is no provider {provider!r}: give one of {', '.join(get_args(Provider))}")
        sessions = {}
        try:
            for role, spec in _signatures(bundle.manifest, sequences).items():
                file = batch_role(role) if sequences > 1 and role in BATCH_ROLES else role
                if role in BATCH_ROLES and provider == "webgpu":
                    sessions[role] = onnx_webgpu.open_session(bundle.path(file), pooled_options(threads))
                else:
                    packed = None
                    if role in BATCH_ROLES:  # the others look rows up, which nothing packs
                        files = (bundle.manifest.files[name] for name in (file, f"{role}_data"))
                        packed = PackedWeights(cache_dir or default_folder(), ONNX_RUNTIME, *files)
                    sessions[role] = open_graph(bundle.path(file), threads, packed)
                _check_graph(sessions[role], role, spec)
        except REFUSED as error:
            raise BackendError(f"ONNX Runtime refuses the bundle: {error}") from error
        return cls(bundle.manifest, sessions, sequences, HostRows if provider == "cpu" else onnx_webgpu.DeviceRows)

    def run_target(self, pieces: Mapping[int, TargetPiece]) -> dict[int, TargetPass]:
        """Process tokens of some sequences, by their numbers, in one pass; no cache is advanced.

        Raises:
            ContextFullError: the pass would write beyond a cache.
            BackendError: ONNX Runtime refused.
        """
        # A sequence without a part has one token all the same, and its row.
        counts = [len(pieces[i].token_ids) if i in pieces else 1 for i in range(self._sequences)]
        row_counts = [pieces[i].logit_rows if i in pieces else 1 for i in range(self._sequences)]
        rows: list[int] = []
        token_ids: list[int] = []
        positions: list[int] = []
        for i, count in enumerate(counts):
            if i in pieces:
                self.prepare(i, count)
            end = sum(counts[: i + 1])
            rows += range(end - row_counts[i], end)
            token_ids += pieces[i].token_ids if i in pieces else (0,)
            positions += range(self.caches[i].filled_length, self.caches[i].filled_length + count)
        run = self.target_run(sum(counts), len(rows), tuple(pieces))
        if self._sequences > 1:
            run.inputs[TOKEN_COUNTS][:], run.inputs[ROW_COUNTS][:] = counts, row_counts
        run.inputs["logit_rows"][:], run.inputs["positions"][0], run.tokens[0] = rows, positions, token_ids
        self._look_up(run.look_ups)
        run.graph.run()
        said = {}
        for i in pieces:
            start = sum(row_counts[:i])
            mine = slice(start, start + row_counts[i])
            said[i] = TargetPass(*(run.outputs[name][0, mine].copy() for name in ("logits", "activations")))
        return said

    def run_drafter(self, steps: Mapping[int, DraftStep]) -> dict[int, Draft]:
        """Run the drafter once for some sequences, by their numbers, over the filled positions of each.

        Raises:
            BackendError: ONNX Runtime refused.
        """
        run = self._kept(("draft", *sorted(steps)), lambda: DraftRun(self, tuple(steps)))
        for i, step in steps.items():
            self.prepare(i, 0)
            run.tokens[i, 0] = step.token_id
        self._look_up(run.look_ups)
        size = run.embeddings.shape[-1]
        run.inputs["activations"][:, 0, :size] = run.embeddings[:, 0]
        for i, step in steps.items():
            run.inputs["activations"][i, 0, size:] = step.activations
            # The position of the last processed token, as in the other export format; the graph adds its own offset.
            run.inputs["positions"][i, 0] = self.caches[i].filled_length - 1
        run.graph.run()
        return {i: run.draft(i, with_candidates=step.with_candidates) for i, step in steps.items()}

    def prepare(self, sequence: int, count: int) -> None:
        """Make room for `count` tokens of a sequence, and tell the graphs how full its pools will be.

        Raises:
            ContextFullError: they do not fit.
        """
        cache = self.caches[sequence]
        cache.settle(count)
        total = cache.filled_length + count
        for pool, rows in (("full", total), ("sliding", total - cache.first_position)):
            self._own[sequence][f"{pool}_last"].numpy()[0] = rows - 1
            self._own[sequence][f"{pool}_total"].numpy()[...] = rows

    def close(self) -> None:
        """Release the sessions and buffers; closing twice is harmless."""
        for run in self._bound.values():
            run.release()
        self._bound.clear()
        self._sessions.clear()

    @property
    def cache_values(self) -> tuple[Mapping[str, ort.OrtValue], ...]:
        """The very objects that every pass binds, by the name of the cache tensor, of each sequence."""
        return tuple({n: value for n, value in own.items() if CacheName.in_name(n)} for own in self._own)

    def target_run(self, num_tokens: int, num_rows: int, sequences: tuple[int, ...]) -> TargetRun:
        """Bind the target for passes of some sequences: over so many tokens in all, with logits of `num_rows`."""
        key = ("target", num_tokens, num_rows, *sorted(sequences))
        run: TargetRun = self._kept(key, lambda: TargetRun(self, num_tokens, num_rows, sequences))
        return run

    def bind(self, role: str, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue]) -> BoundGraph:
        """Bind a graph to its buffers.

        Raises:
            BackendError: the bundle is closed.
        """
        if role not in self._sessions:
            raise _closed(role)
        return BoundGraph(self._sessions[role], role, inputs, outputs)

    def inputs(self, role: str, sizes: Mapping[str, int], sequences: Collection[int]) -> dict[str, ort.OrtValue]:
        """The buffer of every input of a graph, at these sizes of what may vary, for a pass of some sequences."""
        return {
            spec.name: self._own_buffer(spec.name, sequences) or self._buffer(f"{role}/{spec.name}", spec, sizes)
            for spec in self._specs[role].inputs
        }

    def outputs(self, role: str, sizes: Mapping[str, int], sequences: Collection[int]) -> dict[str, ort.OrtValue]:
        """The same of every output. A cache goes out where it came in, for the layers that only read one too: a
        present apart from the past is a copy."""
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
        """What belongs to one sequence: a cache, or how full it is."""
        for i, own in enumerate(self._own):
            if self._sequences > 1:
                own = {of_sequence(n, i): value for n, value in (own if i in sequences else self._nobody).items()}
            if name in own:
                return own[name]
        return None

    def _buffer(self, name: str, spec: TensorSpec, sizes: Mapping[str, int]) -> ort.OrtValue:
        """Memory that all passes of one kind share, whatever their sizes: the beginning of one array."""
        if name not in self._memory:
            self._memory[name] = np.zeros(math.prod(_sized(spec.shape, self._sizes)), np.dtype(spec.dtype))
        shape = _sized(spec.shape, sizes)
        return _shared(self._memory[name][: math.prod(shape)].reshape(shape))

    def _kept(self, key: object, make: Callable[[], Any]) -> Any:
        """Return what is bound for passes of one kind, made where it is new."""
        if key not in self._bound:
            self._bound[key] = make()
            if len(self._bound) > _MOST_BINDINGS:
                self._bound.popitem(last=False)
        self._bound.move_to_end(key)
        return self._bound[key]

    def _look_up(self, look_ups: Iterable[BoundGraph]) -> None:
        started = time.perf_counter()
        for look_up in look_ups:
            look_up.run()
        self.embed_ms += 1000.0 * (time.perf_counter() - started)

    def _new_cache(self, sequence: int) -> PooledKVCache:
        manifest = self._manifest
        for pool in ("full", "sliding"):
            for own in (self._own[sequence], self._nobody):
                own[f"{pool}_last"] = _shared(np.zeros(1, np.int32))
                own[f"{pool}_total"] = _shared(np.ones((), np.int32))
        caches = [spec for spec in manifest.signatures["target"][0].inputs if spec.is_cache]
        longest = max(PREFILL_TOKENS, manifest.num_draft_tokens + 1)
        allocate = functools.partial(self._allocate, sequence)
        return PooledKVCache(caches, manifest.cache_length, _window(manifest), longest, allocate)

    def _allocate(self, sequence: int, name: str, shape: tuple[int, ...]) -> CacheRows:
        batch, groups, _, size = shape
        rows = self._new_rows(shape)
        self._own[sequence][name] = rows.value
        self._nobody[name] = self._new_rows((batch, groups, 1, size)).value
        return rows


class BoundRows(CacheRows, Protocol):
    """Rows of a cache that are bound to graphs as `value`."""

    value: ort.OrtValue


class HostRows:
    """Rows of a cache in the CPU's memory. Shapes: value [1, G, slots, D]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Allocate zeroed rows."""
        self._memory = np.zeros(shape, np.float32)
        self.value = _shared(self._memory)

    def read(self) -> FloatArray:
        """Return all rows, the very memory."""
        return self._memory

    def write(self, rows: FloatArray) -> None:
        """Replace the leading rows. Shapes: rows [1, G, n, D]."""
        self._memory[:, :, : rows.shape[2]] = rows


class BoundGraph:
    """A graph with its buffers bound."""

    def __init__(
        self,
        session: ort.InferenceSession,
        role: str,
        inputs: Mapping[str, ort.OrtValue],
        outputs: Mapping[str, ort.OrtValue],
    ) -> None:
        self._session: ort.InferenceSession | None = session
        self._role = role
        self.binding = session.io_binding()
        # A provider with memory of its own copies an input when it is bound: what changes is bound for each pass again.
        copies = session.get_providers()[0] != _CPU_PROVIDER
        self._copied = {name: value for name, value in inputs.items() if copies and value.device_name() == _CPU}
        for name, value in inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self.binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        if self._session is None:
            raise _closed(self._role)
        try:
            for name, value in self._copied.items():
                self.binding.bind_ortvalue_input(name, value)
            self._session.run_with_iobinding(self.binding)
        except REFUSED as error:
            raise BackendError(f"ONNX Runtime failed to run {self._role}: {error}") from error

    def release(self) -> None:
        """Let go of the session."""
        self._session = None


class _Run:
    """A graph that attends, and those that look up what it is fed, with the buffers that are written and read."""

    def __init__(self, graphs: OnnxGraphs, role: str, sizes: Mapping[str, int], sequences: Collection[int]) -> None:
        values, results = graphs.inputs(role, sizes, sequences), graphs.outputs(role, sizes, sequences)
        self.graph = graphs.bind(role, values, results)
        self.inputs, self.outputs = _at_hand(values), _at_hand(results)
        self.values = values
        self.look_ups: list[BoundGraph] = []

    def release(self) -> None:
        for graph in (self.graph, *self.look_ups):
            graph.release()


def _at_hand(values: Mapping[str, ort.OrtValue]) -> dict[str, Any]:
    """The memory of those values that the CPU can write and read in place."""
    return {name: value.numpy() for name, value in values.items() if value.device_name() == _CPU}


class TargetRun(_Run):
    """The target over `num_tokens`, with logits of `num_rows` of them."""

    def __init__(self, graphs: OnnxGraphs, num_tokens: int, num_rows: int, sequences: Collection[int]) -> None:
        super().__init__(graphs, "target", {"tokens": num_tokens, "rows": num_rows, "batch": 1}, sequences)
        tokens = _shared(np.zeros((1, num_tokens), np.int32))
        self.tokens = tokens.numpy()
        self.look_ups = [
            graphs.bind(role, {"token_ids": tokens}, {"embeddings": self.values[name]})
            for role, name in (("embedder", "embeddings"), ("per_layer_embedder", "per_layer_embeddings"))
        ]


class DraftRun(_Run):
    """One step of the drafter."""

    def __init__(self, graphs: OnnxGraphs, sequences: Collection[int]) -> None:
        count = len(graphs.caches)
        super().__init__(graphs, "drafter", {"batch": count}, sequences)
        tokens = _shared(np.zeros((count, 1), np.int32))
        self.tokens = tokens.numpy()
        spec = graphs.output_spec("embedder", "embeddings")
        embeddings = _shared(np.zeros(_sized(spec.shape, {"batch": count, "tokens": 1}), np.float32))
        self.embeddings = embeddings.numpy()
        self.look_ups = [graphs.bind("embedder", {"token_ids": tokens}, {"embeddings": embeddings})]

    def draft(self, sequence: int, *, with_candidates: bool) -> Draft:
        """Copy what was said of one sequence."""
        best, activations = int(self.outputs["best"][sequence, 0]), self.outputs["projected_activations"][sequence, 0]
        if not with_candidates:
            return Draft(best, activations.copy(), None, None)
        candidates, scores = (self.outputs[name][sequence].copy() for name in ("candidates", "scores"))
        return Draft(best, activations.copy(), candidates, scores)


_pools: list[int] = []  # the one that was made, if any: it cannot be made twice, nor change its size


def open_graph(path: Path, threads: int, packed: PackedWeights | None = None) -> ort.InferenceSession:
    """Load a graph for the CPU, onto the process's one thread pool; from `packed`, which is written if it is new."""
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
    return ort.InferenceSession(str(path), options, providers=[_CPU_PROVIDER])


def _write_packed(path: Path, threads: int, folder: Path) -> None:
    """Write a graph as it was optimised for this processor, with its packed weights, to a new folder."""
    folder.mkdir()
    options = pooled_options(threads)
    options.optimized_model_filepath = str(folder / path.name)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{path.name}.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    open_session(path, options)


def pooled_options(threads: int) -> ort.SessionOptions:
    """Options of a session on the process's one thread pool, whose first user sizes it: once it is there, ONNX Runtime
    refuses sessions with pools of their own."""
    if not _pools:
        ort.set_global_thread_pool_sizes(threads, 1)
        _pools.append(threads)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = _ERRORS_ONLY
    return options


def _signatures(manifest: Manifest, sequences: int) -> dict[str, GraphSignature]:
    """The signature of each graph that `sequences` sequences need."""
    single = {role: manifest.signatures[role][0] for role in GRAPH_ROLES}
    if sequences == 1:
        return single
    return single | {role: for_sequences(single[role], sequences) for role in BATCH_ROLES}


def _shared(array: Any) -> ort.OrtValue:
    """A value on the memory of `array`: what is written to one is in the other."""
    return ort.OrtValue.ortvalue_from_numpy(array, _CPU)


def _sized(shape: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else sizes[size] for size in shape)


def _closed(role: str) -> BackendError:
    return BackendError(f"{role} cannot run: its bundle is closed")


def _window(manifest: Manifest) -> int:
    """Sliding window of the target."""
    window = manifest.target.get("sliding_window")
    if not isinstance(window, int) or window < 1:
        raise BundleError(f"the manifest gives the target the sliding window {window!r}: export the bundle again")
    return window


def _check_graph(session: ort.InferenceSession, role: str, spec: GraphSignature) -> None:
    """Check that a graph has the signature `spec`, tensor by tensor."""
    for stated, details, name_of in (
        (spec.inputs, session.get_inputs(), str),
        (spec.outputs, session.get_outputs(), output_name),
    ):
        expected = {name_of(t.name): (t.dtype, list(t.shape)) for t in stated}
        found = {t.name: (_DTYPES.get(t.type, t.type), list(t.shape)) for t in details}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise BundleError(
                    f"{role} {spec.name}: {name} is {found.get(name, 'absent')} in the graph and "
                    f"{expected.get(name, 'absent')} in the manifest: export the bundle again"
                )
