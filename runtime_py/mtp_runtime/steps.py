"""One pass of each graph with its fixed inputs prepared: embed, target pass, draft pass.

Everything here is bound once and reused: the loop only names positions and tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from mtp_runtime.backend import Backend, BoundSignature, FloatArray
from mtp_runtime.contract import GraphSignature, Manifest, SignatureKind
from mtp_runtime.errors import BundleError, ContextFullError
from mtp_runtime.masks import CausalMask
from mtp_runtime.stats import GenerationStats

# Embeddings of the tokens seen last are kept: looking one up costs two runs of a graph, some 20 µs.
_KEPT_EMBEDDINGS_BYTES = 16 << 20


class TokenRows:
    """Embeddings of the consecutive tokens of a pass, looked up into arrays that are reused.

    Shapes: embeddings [1, T, H], per_layer_embeddings [1, T, L, P].
    """

    def __init__(self, backend: Backend, num_tokens: int) -> None:
        """Prepare rows for passes of up to `num_tokens` tokens."""
        self._lookups = (backend.bound("embedder", "embed"), backend.bound("per_layer_embedder", "embed"))
        shapes = [lookup.spec.outputs[0].shape for lookup in self._lookups]
        self.embeddings = np.zeros((1, num_tokens, *shapes[0][2:]), np.float32)
        self.per_layer_embeddings = np.zeros((1, num_tokens, *shapes[1][2:]), np.float32)
        self._id = np.zeros((1, 1), np.int32)
        self._kept: dict[int, tuple[FloatArray, ...]] = {}
        self._most_kept = _KEPT_EMBEDDINGS_BYTES // (
            self.embeddings[0, 0].nbytes + self.per_layer_embeddings[0, 0].nbytes
        )

    def set(self, row: int, token: int, stats: GenerationStats) -> None:
        """Look up `token` into `row`, adding the time to `stats.embed_ms`."""
        start = time.perf_counter()
        found = self._kept.get(token)
        if found is None:
            found = self._look_up(token)
        self.embeddings[0, row], self.per_layer_embeddings[0, row] = found
        stats.embed_ms += 1000.0 * (time.perf_counter() - start)

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


class PassSelector:
    """The signatures of one kind and one number of tokens, told apart by how much of the cache they read."""

    def __init__(self, backend: Backend, role: str, specs: Sequence[GraphSignature]) -> None:
        """Take at least one signature of the same kind and `num_tokens`."""
        self.num_tokens = specs[0].num_tokens
        self._backend = backend
        self._role = role
        self._by_length = sorted(specs, key=lambda spec: spec.attention_length)

    def reading(self, length: int) -> BoundSignature:
        """Return the cheapest signature that reads the first `length` cache positions.

        Raises:
            ContextFullError: none reads that many.
        """
        for spec in self._by_length:
            if spec.attention_length >= length:
                return self._backend.bound(self._role, spec.name)
        raise ContextFullError(f"no signature reads {length} positions: the cache is full, shorten the text")


class TargetPasses:
    """The target's passes over T consecutive tokens, for every T that the bundle has a signature for."""

    def __init__(self, backend: Backend, manifest: Manifest, mask: CausalMask) -> None:
        """Bind nothing yet: each signature is bound when it is first needed."""
        self._mask = mask
        self.decode = PassSelector(backend, "target", of_kind(manifest, "target", "decode"))
        self.verify = PassSelector(backend, "target", of_kind(manifest, "target", "verify"))
        prefill = of_kind(manifest, "target", "prefill")
        self.prefill = {
            size: PassSelector(backend, "target", [spec for spec in prefill if spec.num_tokens == size])
            for size in sorted({spec.num_tokens for spec in prefill})
        }
        self._positions = np.arange(manifest.cache_length, dtype=np.int32)

    def run(self, selector: PassSelector, rows: TokenRows, used: int, position: int) -> BoundSignature:
        """Process the first `used` tokens of `rows` at `position` and after, writing their cache rows.

        The rest of the pass is padding, whose cache rows and outputs mean nothing. Returns the signature that ran, to
        read its outputs from.

        Raises:
            ContextFullError: the pass would write beyond the cache.
        """
        count = selector.num_tokens
        bound = selector.reading(position + count)
        if used < count:
            rows.pad(used, count)
        bound.write("embeddings", rows.embeddings[:, :count])
        bound.write("per_layer_embeddings", rows.per_layer_embeddings[:, :count])
        bound.write("input_pos", self._positions[position : position + count])
        bound.write("mask", self._mask.visible(position + 1, count))
        bound.run()
        return bound


class DraftPasses:
    """The drafter's chained passes of one round."""

    def __init__(self, backend: Backend, manifest: Manifest, mask: CausalMask) -> None:
        """Bind nothing yet: each signature is bound when it is first needed."""
        self._mask = mask
        self._selector = PassSelector(backend, "drafter", of_kind(manifest, "drafter", "draft"))
        self._input = np.zeros((1, 1, 2 * manifest.hidden_size), np.float32)
        self._position = np.zeros(1, np.int32)

    def propose(
        self, count: int, rows: TokenRows, activations: FloatArray, position: int, stats: GenerationStats
    ) -> list[int]:
        """Propose `count` tokens after the pending one, whose embedding is row 0 of `rows`.

        Each proposal's embedding goes into the next row. `activations` is the target's at the position before the
        pending token's `position`; the drafter sees the keys before the pending token, at every step of the round.

        Shapes: activations [H].
        """
        hidden_size = activations.shape[-1]
        bound = self._selector.reading(position)
        self._position[0] = position - 1
        bound.write("input_pos", self._position)
        bound.write("mask", self._mask.visible(position))
        self._input[0, 0, hidden_size:] = activations
        drafts: list[int] = []
        for step in range(count):
            self._input[0, 0, :hidden_size] = rows.embeddings[0, step]
            bound.write("activations", self._input)
            bound.run()
            draft = int(bound.read("logits").argmax())
            drafts.append(draft)
            rows.set(step + 1, draft, stats)
            if step + 1 < count:
                self._input[0, 0, hidden_size:] = bound.read("projected_activations")[0, 0]
        return drafts


def of_kind(manifest: Manifest, role: str, kind: SignatureKind) -> list[GraphSignature]:
    """Return the signatures of the graph `role` that are of `kind`.

    Raises:
        BundleError: there is none.
    """
    found = [spec for spec in manifest.signatures.get(role, ()) if spec.kind == kind]
    if not found:
        raise BundleError(f"the bundle's {role} has no {kind} signature: export it again with this version")
    return found


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
