"""The graphs of an ONNX bundle, for one sequence or several that share their passes."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import onnxruntime as ort

from mtp_runtime.backends.onnx import webgpu
from mtp_runtime.backends.onnx.buffers import GraphBuffers, HostRows, signatures
from mtp_runtime.backends.onnx.errors import REFUSED
from mtp_runtime.backends.onnx.opening import GraphOpener, check_graph, open_graph, pooled_options
from mtp_runtime.backends.onnx.runs import BoundGraph, DraftRun, OpenedGraphs, TargetRun
from mtp_runtime.backends.packed_weights import ONNX_RUNTIME, PackedWeights, default_folder
from mtp_runtime.bundle.bundle import Bundle
from mtp_runtime.bundle.contract import BATCH_ROLES, ROW_COUNTS, TOKEN_COUNTS, batch_role
from mtp_runtime.errors import BackendError, UserError
from mtp_runtime.generate.backend import Draft, FloatArray, Provider, TargetPass

_MOST_BINDINGS = 64  # kept, by the numbers of tokens of their passes


class TargetPiece(NamedTuple):
    """Tokens of one sequence in a pass of the target, which returns logits of the last `logit_rows` of them."""

    token_ids: tuple[int, ...]
    logit_rows: int


class DraftStep(NamedTuple):
    """One sequence's part in a pass of the drafter. Shapes: activations [H]."""

    token_id: int
    activations: FloatArray
    with_candidates: bool


class OnnxGraphs:
    """The opened graphs, and a cache for each sequence."""

    def __init__(self, opened: OpenedGraphs) -> None:
        """Take opened graphs and their buffers; use `open`."""
        self.opened = opened
        self.caches = opened.buffers.caches
        self._sequences = opened.buffers.sequences
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
        open_graph: GraphOpener = open_graph,
    ) -> OnnxGraphs:
        """Load the bundle's graphs and allocate the caches. The thread pool is the process's: its first user sizes it.
        Packed weights are kept in `cache_dir`, by default `packed_weights.default_folder()`.

        With "webgpu" the graphs that attend run on the GPU, and the caches are in its memory. What looks rows up stays
        on the CPU, which maps the tables. `open_graph` loads the graphs that run on the CPU.

        Raises:
            UserError: the provider is not there.
            BundleError: a graph is missing or contradicts the manifest.
            BackendError: ONNX Runtime refuses a graph.
        """
        if provider not in get_args(Provider):
            raise UserError(f"there is no provider {provider!r}: give one of {', '.join(get_args(Provider))}")
        sessions: dict[str, ort.InferenceSession] = {}
        try:
            for role, spec in signatures(bundle.manifest, sequences).items():
                file = batch_role(role) if sequences > 1 and role in BATCH_ROLES else role
                if role in BATCH_ROLES and provider == "webgpu":
                    sessions[role] = webgpu.open_session(bundle.path(file), pooled_options(threads))
                else:
                    packed = None
                    if role in BATCH_ROLES:  # the others look rows up, which nothing packs
                        files = (bundle.manifest.files[name] for name in (file, f"{role}_data"))
                        packed = PackedWeights(cache_dir or default_folder(), ONNX_RUNTIME, *files)
                    sessions[role] = open_graph(bundle.path(file), threads, packed)
                check_graph(sessions[role], role, spec)
        except REFUSED as error:
            raise BackendError(f"ONNX Runtime refuses the bundle: {error}") from error
        new_rows = HostRows if provider == "cpu" else webgpu.DeviceRows
        return cls(OpenedGraphs(sessions, GraphBuffers(bundle.manifest, sequences, new_rows)))

    @property
    def cache_values(self) -> tuple[Mapping[str, ort.OrtValue], ...]:
        """The very objects that every pass binds, by the name of the cache tensor, of each sequence."""
        return self.opened.buffers.cache_values

    def prepare(self, sequence: int, count: int) -> None:
        """Make room for `count` tokens of a sequence, and set how full its pools will be for the graphs.

        Raises:
            ContextFullError: they do not fit.
        """
        self.opened.buffers.prepare(sequence, count)

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
        passes = {}
        for i in pieces:
            start = sum(row_counts[:i])
            mine = slice(start, start + row_counts[i])
            passes[i] = TargetPass(*(run.outputs[name][0, mine].copy() for name in ("logits", "activations")))
        return passes

    def run_drafter(self, steps: Mapping[int, DraftStep]) -> dict[int, Draft]:
        """Run the drafter once for some sequences, by their numbers, over the filled positions of each.

        Raises:
            BackendError: ONNX Runtime refused.
        """
        run: DraftRun = self._kept(("draft", *sorted(steps)), lambda: DraftRun(self.opened, tuple(steps)))
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

    def target_run(self, num_tokens: int, num_rows: int, sequences: tuple[int, ...]) -> TargetRun:
        """Bind the target for passes of some sequences: over so many tokens in all, with logits of `num_rows`."""
        key = ("target", num_tokens, num_rows, *sorted(sequences))
        run: TargetRun = self._kept(key, lambda: TargetRun(self.opened, num_tokens, num_rows, sequences))
        return run

    def close(self) -> None:
        """Release the sessions and buffers; closing twice is harmless."""
        for run in self._bound.values():
            run.release()
        self._bound.clear()
        self.opened.close()

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
