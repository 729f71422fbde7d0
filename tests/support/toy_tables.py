"""A backend of two tables of logits: what follows depends on the last two tokens alone, and can be counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtp_runtime.errors import ContextFullError
from mtp_runtime.generate.backend import Draft, FloatArray, TargetPass

VOCAB = 8


class TokenCache:
    """Implements KVCache with the tokens themselves for rows."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.filled_length = 0
        self.names = ()
        self.tokens = np.zeros(length + 1, np.int64)  # slot 0 precedes the first token

    @property
    def pass_room(self) -> int:
        return self.length - self.filled_length - 1

    def keepable(self, count: int) -> int:
        return count

    def advance(self, count: int) -> None:
        if self.filled_length + count > self.length:
            raise ContextFullError("full")
        self.filled_length += count

    def rewind(self, filled_length: int) -> None:
        assert filled_length <= self.filled_length
        self.filled_length = filled_length

    def rows(self, name: str, filled_length: int | None = None) -> FloatArray:
        raise NotImplementedError

    def restore(self, rows: dict[str, FloatArray]) -> None:
        raise NotImplementedError


class TableBackend:
    """Implements Backend: the target is `target[before, last]`, the drafter `drafter[before, last]`.

    The drafter scores only `candidates`, those of the token it is fed. Activations hold the token before.

    Shapes: target [V, V, V], drafter [V, V, V], candidates [V, N].
    """

    def __init__(self, target: FloatArray, drafter: FloatArray, candidates: np.ndarray, length: int) -> None:
        self.kv_cache = TokenCache(length)
        self.embed_ms = 0.0
        self._target, self._drafter, self._candidates = target, drafter, candidates.astype(np.int32)

    def prefill(self, token_ids: Sequence[int]) -> None:
        self._write(token_ids)
        self.kv_cache.advance(len(token_ids))

    def verify(self, token_ids: Sequence[int]) -> TargetPass:
        start = self._write(token_ids)
        stop = start + len(token_ids)
        before, last = self.kv_cache.tokens[start:stop], self.kv_cache.tokens[start + 1 : stop + 1]
        return TargetPass(self._target[before, last], last[:, None].astype(np.float32))

    def draft(self, token_id: int, activations: FloatArray, *, with_candidates: bool = False) -> Draft:
        candidates = self._candidates[token_id]
        scores = self._drafter[int(activations[0]), token_id][candidates]
        after = np.array([token_id], np.float32)
        best = int(candidates[scores.argmax()])
        return Draft(best, after, candidates, scores) if with_candidates else Draft(best, after, None, None)

    def close(self) -> None:
        pass

    def _write(self, token_ids: Sequence[int]) -> int:
        start = self.kv_cache.filled_length
        self.kv_cache.tokens[start + 1 : start + 1 + len(token_ids)] = token_ids
        return start
