"""The ONNX Runtime backend: four sessions on one thread pool, over one set of cache buffers.

What makes it in place (measured with onnxruntime 1.32): GroupQueryAttention writes its rows into the buffer that is
bound as past and as present; with a buffer apart for the present it copies the cache. Two sessions with pools of
their own spin against each other, so all share the process-wide one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from mtp_runtime.backend import Draft, FloatArray, TargetPass
from mtp_runtime.bundle import Bundle
from mtp_runtime.contract import GRAPH_ROLES, GraphSignature, Manifest
from mtp_runtime.errors import BackendError, BundleError
from mtp_runtime.pooled_cache import PooledKVCache

PREFILL_TOKENS = 256  # of a pass: enough to use the cores, few enough for the buffers of sliding layers
_DTYPES = {"tensor(float)": "float32", "tensor(int32)": "int32"}
_ERRORS_ONLY = 3
_CPU = "cpu"


class OnnxBackend:
    """Implements `Backend` on onnxruntime's CPU provider."""

    def __init__(self, bundle: Bundle, sessions: Mapping[str, ort.InferenceSession]) -> None:
        """Take opened `sessions` by role; use `open`."""
        manifest = bundle.manifest
        self._manifest = manifest
        self._sessions = dict(sessions)
        self._values: dict[str, ort.OrtValue] = {}
        target, drafter = (manifest.signatures[role][0] for role in ("target", "drafter"))
        caches = [spec for spec in target.inputs if spec.is_cache]
        longest = max(PREFILL_TOKENS, manifest.num_draft_tokens + 1)
        self._cache = PooledKVCache(caches, manifest.cache_length, _window(manifest), longest, self._allocate)
        self._fill = {
            name: _new((1,) if name.endswith("last") else (), np.int32)
            for name in ("full_last", "full_total", "sliding_last", "sliding_total")
        }
        self._per_layer_shape = next(t.shape[2:] for t in target.inputs if t.name == "per_layer_embeddings")
        self._passes: dict[tuple[int, int], _TargetRun] = {}
        self._draft = _DraftRun(self, drafter)
        self._fewest_tokens = 1 if manifest.recipe == "f32" else 2
        self.embed_ms = 0.0

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int = 2) -> OnnxBackend:
        """Load the bundle's graphs and allocate the cache. The thread pool is the process's: its first user sizes it.

        Raises:
            BundleError: a graph is missing or contradicts the manifest.
            BackendError: ONNX Runtime refuses a graph.
        """
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = _ERRORS_ONLY
        sessions = {}
        try:
            _share_threads(threads)
            for role in GRAPH_ROLES:
                path = str(bundle.path(role))
                sessions[role] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                _check_graph(sessions[role], role, bundle.manifest.signatures[role][0])
        except (RuntimeError, ValueError) as error:
            # onnxruntime's own errors have no common base of theirs; all are RuntimeErrors or ValueErrors of pybind.
            raise BackendError(f"ONNX Runtime refuses the bundle: {error}") from error
        return cls(bundle, sessions)

    @property
    def kv_cache(self) -> PooledKVCache:
        """The one KV cache of this bundle, shared by the target and the drafter."""
        return self._cache

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Process tokens in passes of up to PREFILL_TOKENS, and advance the cache."""
        for start in range(0, len(token_ids), PREFILL_TOKENS):
            piece = token_ids[start : start + PREFILL_TOKENS]
            self._run(piece, logit_rows=1)
            self._cache.advance(len(piece))

    def verify(self, token_ids: Sequence[int]) -> TargetPass:
        """Process tokens in one pass, of two where a quantised target is given one (docs/decisions/0005)."""
        count = len(token_ids)
        padding = (0,) * (self._fewest_tokens - count)
        run = self._run((*token_ids, *padding), logit_rows=count + len(padding))
        return TargetPass(run.outputs["logits"][0, :count].copy(), run.outputs["activations"][0, :count].copy())

    def draft(self, token_id: int, activations: FloatArray, *, with_candidates: bool = False) -> Draft:
        """Run the drafter once over the filled positions."""
        self.prepare(0)
        run = self._draft
        self._look_up("embedder", run.token, run.embedding, (token_id,))
        size = activations.shape[-1]
        run.inputs["activations"][0, 0, :size] = run.embedding_view[0, 0]
        run.inputs["activations"][0, 0, size:] = activations
        # The position of the last processed token, as in the other export format; the graph adds its own offset.
        run.inputs["positions"][0, 0] = self._cache.filled_length - 1
        run.run()
        best, projected = int(run.outputs["best"][0, 0]), run.outputs["projected_activations"][0, 0].copy()
        if not with_candidates:
            return Draft(best, projected, None, None)
        return Draft(best, projected, run.outputs["candidates"][0].copy(), run.outputs["scores"][0].copy())

    def close(self) -> None:
        """Release the sessions and buffers; closing twice is harmless."""
        self._passes.clear()
        self._draft.release()
        self._sessions.clear()

    def cache_values(self) -> Mapping[str, ort.OrtValue]:
        """The very objects that every pass binds, by the name of the cache tensor."""
        return self._values

    def fill_values(self) -> Mapping[str, ort.OrtValue]:
        """How full the pools are, as every graph is told."""
        return self._fill

    def session(self, role: str) -> ort.InferenceSession:
        """Return the session of a graph.

        Raises:
            BackendError: the bundle is closed.
        """
        if role not in self._sessions:
            raise BackendError(f"{role} cannot run: its bundle is closed")
        return self._sessions[role]

    def _allocate(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        self._values[name] = _new(shape, np.float32)
        buffer: FloatArray = _view(self._values[name])
        return buffer

    def _run(self, token_ids: Sequence[int], *, logit_rows: int) -> _TargetRun:
        count = len(token_ids)
        self.prepare(count)
        run = self._passes.get((count, logit_rows))
        if run is None:
            run = _TargetRun(self, self._manifest.signatures["target"][0], count, logit_rows)
            if count in (*range(1, self._manifest.num_draft_tokens + 2), PREFILL_TOKENS):
                self._passes[count, logit_rows] = run
        for role, name in (("embedder", "embeddings"), ("per_layer_embedder", "per_layer_embeddings")):
            self._look_up(role, run.tokens, run.values[name], token_ids)
        run.inputs["positions"][0] = np.arange(self._cache.filled_length, self._cache.filled_length + count)
        run.run()
        return run

    def _look_up(self, role: str, tokens: ort.OrtValue, into: ort.OrtValue, token_ids: Sequence[int]) -> None:
        started = time.perf_counter()
        _view(tokens)[0] = token_ids
        binding = self.session(role).io_binding()
        binding.bind_ortvalue_input("token_ids", tokens)
        binding.bind_ortvalue_output("embeddings", into)
        _run_bound(self.session(role), binding, role)
        self.embed_ms += 1000.0 * (time.perf_counter() - started)

    def prepare(self, count: int) -> None:
        """Make room for a pass over `count` tokens, and tell every graph how full the pools will be."""
        self._cache.settle(count)
        total = self._cache.filled_length + count
        for pool, rows in (("full", total), ("sliding", total - self._cache.first_position)):
            _view(self._fill[f"{pool}_last"])[0] = rows - 1
            _view(self._fill[f"{pool}_total"])[...] = rows


class BoundRun:
    """A graph with its buffers bound, at fixed sizes."""

    def __init__(self, backend: OnnxBackend, role: str, spec: GraphSignature, sizes: Mapping[str, int]) -> None:
        self._session: ort.InferenceSession | None = backend.session(role)
        self._role = role
        self.binding = self._session.io_binding()
        self.values: dict[str, ort.OrtValue] = {}
        shared = {**backend.cache_values(), **backend.fill_values()}
        for tensor in spec.inputs:
            value = shared.get(tensor.name) or _new(_sized(tensor.shape, sizes), np.dtype(tensor.dtype).type)
            self.values[tensor.name] = value
            self.binding.bind_ortvalue_input(tensor.name, value)
        self.outputs: dict[str, Any] = {}
        for tensor in spec.outputs:
            if tensor.is_cache:
                # In place, for the layers that only read a cache too: a present apart from the past is a copy.
                self.binding.bind_ortvalue_output(f"{tensor.name}_next", shared[tensor.name.partition(".")[0]])
            else:
                value = _new(_sized(tensor.shape, sizes), np.dtype(tensor.dtype).type)
                self.binding.bind_ortvalue_output(tensor.name, value)
                self.outputs[tensor.name] = _view(value)
        self.inputs = {name: _view(value) for name, value in self.values.items() if name not in shared}

    def run(self) -> None:
        if self._session is None:
            raise BackendError(f"{self._role} cannot run: its bundle is closed")
        _run_bound(self._session, self.binding, self._role)

    def release(self) -> None:
        """Let go of the session."""
        self._session = None


class _TargetRun(BoundRun):
    """The target over `count` tokens, with logits of the last `logit_rows` of them."""

    def __init__(self, backend: OnnxBackend, spec: GraphSignature, count: int, logit_rows: int) -> None:
        super().__init__(backend, "target", spec, {"batch": 1, "tokens": count, "rows": logit_rows})
        self.tokens = _new((1, count), np.int32)
        self.inputs["logit_rows"][:] = np.arange(count - logit_rows, count)


class _DraftRun(BoundRun):
    """One step of the drafter."""

    def __init__(self, backend: OnnxBackend, spec: GraphSignature) -> None:
        super().__init__(backend, "drafter", spec, {"batch": 1})
        self.token = _new((1, 1), np.int32)
        self.embedding = _new((1, 1, self.inputs["activations"].shape[-1] // 2), np.float32)
        self.embedding_view = _view(self.embedding)


_pools: list[int] = []  # the one that was made, if any: it cannot be made twice, nor change its size


def _share_threads(threads: int) -> None:
    """Make the process-wide pool, unless it is there."""
    if not _pools:
        ort.set_global_thread_pool_sizes(threads, 1)
        _pools.append(threads)


def _new(shape: tuple[int, ...], dtype: type[np.generic]) -> ort.OrtValue:
    """Zeroed memory that onnxruntime and numpy share."""
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), _CPU)


def _view(value: ort.OrtValue) -> Any:
    """The memory of a value as an array: live, not a copy."""
    return value.numpy()


def _sized(shape: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else sizes[size] for size in shape)


def _run_bound(session: ort.InferenceSession, binding: ort.IOBinding, role: str) -> None:
    try:
        session.run_with_iobinding(binding)
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"ONNX Runtime failed to run {role}: {error}") from error


def _window(manifest: Manifest) -> int:
    """Sliding window of the target."""
    window = manifest.target.get("sliding_window")
    if not isinstance(window, int) or window < 1:
        raise BundleError(f"the manifest gives the target the sliding window {window!r}: export the bundle again")
    return window


def _check_graph(session: ort.InferenceSession, role: str, spec: GraphSignature) -> None:
    """Check that a graph has the signature `spec`, tensor by tensor."""
    for stated, details, suffix in (
        (spec.inputs, session.get_inputs(), ""),
        (spec.outputs, session.get_outputs(), "_next"),
    ):
        expected = {t.name + (suffix if t.is_cache else ""): (t.dtype, list(t.shape)) for t in stated}
        found = {t.name: (_DTYPES.get(t.type, t.type), list(t.shape)) for t in details}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise BundleError(
                    f"{role} {spec.name}: {name} is {found.get(name, 'absent')} in the graph and "
                    f"{expected.get(name, 'absent')} in the manifest: export the bundle again"
                )
