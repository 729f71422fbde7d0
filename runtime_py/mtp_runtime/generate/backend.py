"""The seam of the runtime: what a `Backend` gives to the loop, whatever library runs the graphs.

A backend has one KV cache, which its target and its drafter share, and processes tokens at `kv_cache.filled_length`.
A pass writes the rows of its tokens there and does not say that they are filled: the loop does, once it knows how
many it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Provider = Literal["cpu", "webgpu"]  # where the graphs of an ONNX pair run
IntArray = NDArray[np.int32]


class TargetPass(NamedTuple):
    """What the target says at each token of a pass. Shapes: logits [T, V], activations [T, H]."""

    logits: FloatArray
    activations: FloatArray


class Draft(NamedTuple):
    """What the drafter says after one token.

    `best` is its first choice; `candidates` are the token ids that it scored, None where they were not asked for, and
    `scores` theirs up to a constant. `activations` are what its next step is fed.

    Shapes: activations [H], candidates [N], scores [N].
    """

    best: int
    activations: FloatArray
    candidates: IntArray | None
    scores: FloatArray | None


class KVCache(Protocol):
    """The positions that hold processed tokens, and their rows."""

    @property
    def length(self) -> int:
        """How many positions there are room for."""
        ...

    @property
    def filled_length(self) -> int:
        """How many leading positions hold the rows of processed tokens."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the cache tensors."""
        ...

    def advance(self, count: int) -> None:
        """Say that the next `count` positions now hold processed tokens.

        Raises:
            ContextFullError: there are not that many left.
        """
        ...

    def rewind(self, filled_length: int) -> None:
        """Drop the rows at and beyond `filled_length`.

        Raises:
            MtpError: fewer positions than that are filled.
        """
        ...

    def rows(self, name: str) -> FloatArray:
        """Return a copy of the filled rows of the tensor `name`. Shapes: [1, G, filled, D]."""
        ...

    def restore(self, rows: dict[str, FloatArray]) -> None:
        """Replace everything by rows that `rows()` gave, of every tensor. Shapes: [1, G, filled, D] each.

        Raises:
            MtpError: a tensor is missing, or of another shape.
        """
        ...


class Backend(Protocol):
    """An opened bundle, ready to run."""

    @property
    def kv_cache(self) -> KVCache:
        """The one KV cache of this bundle, shared by the target and the drafter."""
        ...

    @property
    def embed_ms(self) -> float:
        """Time spent on looking up embeddings since the bundle was opened, which is part of every pass."""
        ...

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Process tokens whose logits nobody wants, and advance the cache by their number.

        Raises:
            ContextFullError: they do not fit the cache.
        """
        ...

    def verify(self, token_ids: Sequence[int]) -> TargetPass:
        """Process 1 to K + 1 tokens in one pass; a pass over one token is a decode step.

        Raises:
            ContextFullError: the pass would write beyond the cache.
            BackendError: the library refused.
        """
        ...

    def draft(self, token_id: int, activations: FloatArray, *, with_candidates: bool = False) -> Draft:
        """Run the drafter once over the filled positions.

        At the first step of a round, `token_id` is the pending token and `activations` the target's at the position
        before it; at later steps both come from the step before. The cache stays as it is throughout a round.

        Shapes: activations [H].
        """
        ...

    def close(self) -> None:
        """Release the graphs and buffers; closing twice is harmless."""
        ...
