"""A backend over static graphs: every signature has a fixed number of tokens, and attention masks as inputs.

Everything is bound once and reused. Nothing is allocated by a run; the KV caches are bound as input and output of
every signature that names them, in the target and in the drafter alike, so a row written by one is there for the
other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mtp_runtime.backends.litert.masks import CausalMask
from mtp_runtime.bundle.contract import PARAM_TENSOR, GraphSignature, Manifest, param_tensor
from mtp_runtime.errors import ContextFullError
from mtp_runtime.generate.backend import Draft, FloatArray, IntArray, TargetPass
from mtp_runtime.generate.kv_cache import StaticKVCache


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


class StaticGraphs(Protocol):
    """The opened graphs of a bundle."""

    @property
    def kv_cache(self) -> StaticKVCache:
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


# Embeddings of the tokens seen last are kept: looking one up costs two runs of a graph, some 20 µs.
_KEPT_EMBEDDINGS_BYTES = 16 << 20


class TokenRows:
    """Embeddings of the consecutive tokens of a pass, looked up into arrays that are reused.

    Shapes: embeddings [1, T, H], per_layer_embeddings [1, T, L, P].
    """

    def __init__(self, graphs: StaticGraphs, num_tokens: int) -> None:
        """Prepare rows for passes of up to `num_tokens` tokens. `embed_ms` is the time that looking them up took."""
        self._lookups = (graphs.bound("embedder", "embed"), graphs.bound("per_layer_embedder", "embed"))
        shapes = [lookup.spec.outputs[0].fixed_shape for lookup in self._lookups]
        self.embeddings = np.zeros((1, num_tokens, *shapes[0][2:]), np.float32)
        self.per_layer_embeddings = np.zeros((1, num_tokens, *shapes[1][2:]), np.float32)
        self.embed_ms = 0.0
        self._id = np.zeros((1, 1), np.int32)
        self._kept: dict[int, tuple[FloatArray, ...]] = {}
        self._most_kept = _KEPT_EMBEDDINGS_BYTES // (
            self.embeddings[0, 0].nbytes + self.per_layer_embeddings[0, 0].nbytes
        )

    def set(self, row: int, token: int) -> None:
        """Look up `token` into `row`."""
        start = time.perf_counter()
        rows = self._kept.get(token)
        if rows is None:
            rows = self._look_up(token)
        self.embeddings[0, row], self.per_layer_embeddings[0, row] = rows
        self.embed_ms += 1000.0 * (time.perf_counter() - start)

    def _look_up(self, token: int) -> tuple[FloatArray, ...]:
        self._id[0, 0] = token
        rows = []
        for lookup in self._lookups:
            lookup.write("token_ids", self._id)
            lookup.run()
            rows.append(lookup.read("embeddings")[0, 0])
        if len(self._kept) >= self._most_kept:
            self._kept.clear()
        self._kept[token] = tuple(rows)
        return self._kept[token]

    def pad(self, count: int, num_tokens: int) -> None:
        """Zero the rows from `count` to `num_tokens`, so that a padded pass never depends on an earlier one."""
        self.embeddings[:, count:num_tokens] = 0.0
        self.per_layer_embeddings[:, count:num_tokens] = 0.0


class TargetPasses:
    """The target's passes over T consecutive tokens, for every T that the bundle has a signature for."""

    def __init__(self, graphs: StaticGraphs, manifest: Manifest, mask: CausalMask) -> None:
        """Bind nothing yet: each signature is bound when it is first needed."""
        self._graphs, self._mask = graphs, mask
        self._length = manifest.cache_length
        self._leaves_out = manifest.chooses_context
        prefill = [spec for spec in manifest.signatures["target"] if spec.name == f"prefill_{spec.num_tokens}"]
        self.decode, self.verify = (manifest.signature("target", name) for name in ("decode", "verify"))
        self.prefill = {spec.num_tokens: spec for spec in sorted(prefill, key=lambda spec: spec.num_tokens)}
        self._positions = np.arange(manifest.cache_length + self.verify.num_tokens, dtype=np.int32)

    def run(self, spec: GraphSignature, rows: TokenRows, used: int, position: int) -> BoundSignature:
        """Process the first `used` tokens of `rows` at `position` and after, writing their cache rows.

        The rest of the pass is padding, whose cache rows and outputs mean nothing. Returns the signature that ran, to
        read its outputs from.

        Raises:
            ContextFullError: the pass would write beyond the cache.
        """
        count = spec.num_tokens
        # The graph itself leaves out rows of a verify that are beyond the cache, or clamps the whole pass.
        needed = position + (used if self._leaves_out else count)
        if needed > self._length:
            raise ContextFullError(f"the cache has {self._length} positions, a pass needs {needed}: shorten the text")
        bound = self._graphs.bound("target", spec.name)
        if used < count:
            rows.pad(used, count)
        bound.write("embeddings", rows.embeddings[:, :count])
        bound.write("per_layer_embeddings", rows.per_layer_embeddings[:, :count])
        bound.write("input_pos", self._positions[position : position + count])
        bound.write("mask", self._mask.visible(position + 1, count))
        if bound.spec.single_buffer:
            bound.write(PARAM_TENSOR, param_tensor(position, position + used))
        bound.run()
        return bound


class DraftPasses:
    """The drafter's passes over the filled positions."""

    def __init__(self, graphs: StaticGraphs, manifest: Manifest, mask: CausalMask) -> None:
        """Bind nothing yet: the signature is bound when it is first needed."""
        self._graphs, self._mask = graphs, mask
        self._input = np.zeros((1, 1, 2 * manifest.hidden_size), np.float32)
        self._position = np.zeros(1, np.int32)
        self._prepared = 0

    def run(self, embedding: FloatArray, activations: FloatArray, position: int) -> BoundSignature:
        """Draft the token after the one whose `embedding` it is; the drafter sees the keys before `position`.

        Shapes: embedding and activations [H].
        """
        bound = self._graphs.bound("drafter", "draft")
        if position != self._prepared:  # it stays the same throughout a round
            self._position[0] = position - 1
            bound.write("input_pos", self._position)
            bound.write("mask", self._mask.visible(position))
            if bound.spec.single_buffer:
                bound.write(PARAM_TENSOR, param_tensor(position - 1, position))
            self._prepared = position
        size = activations.shape[-1]
        self._input[0, 0, :size], self._input[0, 0, size:] = embedding, activations
        bound.write("activations", self._input)
        bound.run()
        return bound


class StaticBackend:
    """Implements `Backend` on static graphs."""

    def __init__(self, graphs: StaticGraphs, manifest: Manifest) -> None:
        """Prepare the passes of every signature kind; `graphs` is closed with this object."""
        self.graphs = graphs
        mask = CausalMask(manifest.cache_length, past_end=manifest.num_draft_tokens)
        self._target = TargetPasses(graphs, manifest, mask)
        self._drafter = DraftPasses(graphs, manifest, mask)
        self._rows = TokenRows(graphs, max((self._target.verify.num_tokens, *self._target.prefill)))

    @property
    def kv_cache(self) -> StaticKVCache:
        """The one KV cache of this bundle."""
        return self.graphs.kv_cache

    @property
    def embed_ms(self) -> float:
        """Time spent on looking up embeddings."""
        return self._rows.embed_ms

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Process tokens in the fewest padded passes, and advance the cache."""
        start = self.kv_cache.filled_length
        sizes = tuple(self._target.prefill)
        self.kv_cache.check_room(len(token_ids))
        for size, count in plan_prefill(start, start + len(token_ids), sizes, self.kv_cache.length):
            position = self.kv_cache.filled_length
            self._look_up(token_ids[position - start : position - start + count])
            self._target.run(self._target.prefill.get(size, self._target.decode), self._rows, count, position)
            self.kv_cache.mark_written(position + size)
            self.kv_cache.advance(count)

    def verify(self, token_ids: Sequence[int]) -> TargetPass:
        """Process tokens in one pass of `decode` or `verify`, padded where there are fewer than K + 1.

        A pass that would go past the end of rings, where rows are left out, is made in two.
        """
        position = self.kv_cache.filled_length
        straight = self.kv_cache.straight(position)
        passes = [self._verify(token_ids[:straight], position)]
        if len(token_ids) > straight:
            passes.append(self._verify(token_ids[straight:], position + straight))
        logits, activations = zip(*passes, strict=True)
        return TargetPass(np.concatenate(logits), np.concatenate(activations)) if len(passes) > 1 else passes[0]

    def _verify(self, token_ids: Sequence[int], position: int) -> TargetPass:
        count = len(token_ids)
        self._look_up(token_ids)
        spec = self._target.decode if count == 1 else self._target.verify
        bound = self._target.run(spec, self._rows, count, position)
        self.kv_cache.mark_written(position + min(spec.num_tokens, self.kv_cache.straight(position)))
        return TargetPass(bound.read("logits")[0, :count], bound.read("activations")[0, :count])

    def draft(self, token_id: int, activations: FloatArray, *, with_candidates: bool = False) -> Draft:
        """Run the drafter once; the tokens that it did not score are those whose logit is 0. Near the end of a context
        that was chosen, or of a ring, the draft is token 0 (docs/decisions/0022)."""
        self._rows.set(0, token_id)
        bound = self._drafter.run(self._rows.embeddings[0, 0], activations, self.kv_cache.filled_length)
        logits = bound.read("logits")[0, 0]
        projected = bound.read("projected_activations")[0, 0]
        if not with_candidates:
            return Draft(int(logits.argmax()), projected, None, None)
        candidates = np.flatnonzero(logits).astype(np.int32)
        return Draft(int(logits.argmax()), projected, candidates, logits[candidates])

    def close(self) -> None:
        """Release the graphs and buffers."""
        self.graphs.close()

    def _look_up(self, token_ids: Sequence[int]) -> None:
        for row, token in enumerate(token_ids):
            self._rows.set(row, token)


def plan_prefill(start: int, stop: int, sizes: Sequence[int], cache_length: int) -> list[tuple[int, int]]:
    """Cut the positions from `start` to `stop` into passes: pairs of signature size and tokens really there.

    A pass of size N writes N rows even if fewer tokens are left, so it must fit the cache whole. A padded pass is
    taken where at least half of it is used, and for the tail that is below every size. Size 1 stands for `decode`,
    which always fits.
    """
    plan: list[tuple[int, int]] = []
    position = start
    while position < stop:
        left = stop - position
        fitting = [size for size in sorted(sizes) if position + size <= cache_length]
        padded = next((size for size in fitting if size >= left), None)
        full = max((size for size in fitting if size <= left), default=None)
        size = padded if padded is not None and (padded <= 2 * left or full is None) else full or 1
        plan.append((size, min(size, left)))
        position += min(size, left)
    return plan
