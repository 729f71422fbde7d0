"""The ONNX Runtime backend: one sequence, alone or one of several that share their passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtp_runtime.backends.onnx.buffers import PREFILL_TOKENS
from mtp_runtime.backends.onnx.graphs import DraftStep, OnnxGraphs, TargetPiece
from mtp_runtime.backends.onnx.opening import GraphOpener, open_graph
from mtp_runtime.backends.onnx.pooled_cache import PooledKVCache
from mtp_runtime.bundle.bundle import Bundle
from mtp_runtime.generate.backend import Draft, FloatArray, Provider, TargetPass
from mtp_runtime.generate.shared_passes import SharedPasses


class OnnxBackend:
    """Implements `Backend` on onnxruntime, for one sequence of `graphs`."""

    def __init__(self, graphs: OnnxGraphs, sequence: int, passes: SharedPasses, *, fewest_tokens: int) -> None:
        """Run through `passes`; use `open` or `open_batch`."""
        self.graphs = graphs
        self._sequence = sequence
        self._passes = passes
        self._cache = graphs.caches[sequence]
        self._fewest_tokens = fewest_tokens

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        threads: int = 2,
        cache_dir: Path | None = None,
        provider: Provider = "cpu",
        open_graph: GraphOpener = open_graph,
    ) -> OnnxBackend:
        """Open the bundle for one sequence, on the CPU or, with "webgpu", on a GPU.

        Packed weights are kept in `cache_dir`, by default `packed_weights.default_folder()`. `open_graph` loads the
        graphs that run on the CPU.

        Raises:
            UserError: the provider is not there.
            BundleError: a graph is missing or contradicts the manifest.
            BackendError: ONNX Runtime refuses a graph.
        """
        graphs = OnnxGraphs.open(bundle, threads=threads, cache_dir=cache_dir, provider=provider, open_graph=open_graph)
        (backend,) = cls._of(graphs, bundle)
        return backend

    @classmethod
    def open_batch(
        cls, bundle: Bundle, *, sequences: int, threads: int = 2, cache_dir: Path | None = None
    ) -> tuple[OnnxBackend, ...]:
        """Open the bundle for several sequences, each to be used from a thread of its own; closing one closes all.

        Raises:
            BundleError, BackendError: as `open` does.
        """
        return cls._of(OnnxGraphs.open(bundle, threads=threads, sequences=sequences, cache_dir=cache_dir), bundle)

    @classmethod
    def _of(cls, graphs: OnnxGraphs, bundle: Bundle) -> tuple[OnnxBackend, ...]:
        """Return a backend for each sequence of `graphs`."""
        passes = SharedPasses({DraftStep: graphs.run_drafter, TargetPiece: graphs.run_target})
        # A quantised target decodes two tokens at a time (docs/decisions/0005).
        fewest = 1 if bundle.manifest.recipe == "f32" else 2
        return tuple(cls(graphs, i, passes, fewest_tokens=fewest) for i in range(len(graphs.caches)))

    @property
    def kv_cache(self) -> PooledKVCache:
        """The one KV cache of this sequence, shared by the target and the drafter."""
        return self._cache

    @property
    def embed_ms(self) -> float:
        """Time spent on looking up embeddings since the bundle was opened, by all sequences together."""
        return self.graphs.embed_ms

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Process tokens in several passes, and advance the cache."""
        for start in range(0, len(token_ids), PREFILL_TOKENS):
            piece = tuple(token_ids[start : start + PREFILL_TOKENS])
            self._cache.check_room(len(piece))
            self._passes.run(self._sequence, TargetPiece(piece, 1))
            self._cache.advance(len(piece))

    def verify(self, token_ids: Sequence[int]) -> TargetPass:
        """Process tokens in one pass."""
        count = len(token_ids)
        padded = (*token_ids, *(0,) * (self._fewest_tokens - count))
        self._cache.check_room(len(padded))  # before others are in the same pass, which would fail with it
        result: TargetPass = self._passes.run(self._sequence, TargetPiece(padded, len(padded)))
        return TargetPass(result.logits[:count], result.activations[:count])

    def draft(self, token_id: int, activations: FloatArray, *, with_candidates: bool = False) -> Draft:
        """Run the drafter once over the filled positions."""
        draft: Draft = self._passes.run(self._sequence, DraftStep(token_id, activations, with_candidates))
        return draft

    def close(self) -> None:
        """Release the sessions and buffers; closing twice is harmless."""
        self.graphs.close()
