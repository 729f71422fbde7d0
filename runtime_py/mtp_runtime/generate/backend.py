"""The seam of the runtime: the passes that a `Backend` runs for the loop, whatever library runs the graphs.

A backend has one KV cache, which its target and its drafter share, and processes tokens at `kv_cache.filled_length`.
A pass writes the rows of its tokens there and leaves `filled_length` as it is: the loop advances it, once it knows how
many rows it keeps.
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
    """The target's outputs at each token of a pass. Shapes: logits [T, V], activations [T, H]."""

    logits: FloatArray
    activations: FloatArray


class Draft(NamedTuple):
    """The drafter's outputs after one token.

    `best` is its first choice; `candidates` are the token ids that it scored, None without `with_candidates`, and
    `scores` theirs up to a constant. `activations` are the input of its next step.

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

    @property
    def pass_room(self) -> int:
        """How many tokens a pass of drafts may have here; 0 or fewer where a round has to do without."""
        ...

    def keepable(self, count: int) -> int:
        """Return how many of the first `count` filled positions can be kept: all, or 0 where rows are lost."""
        ...

    def advance(self, count: int) -> None:
        """Count the next `count` positions as filled with processed tokens.

        Raises:
            ContextFullError: there are not that many left.
        """
        ...

    def rewind(self, filled_length: int) -> None:
        """Drop the rows at and beyond `filled_length`.

        Raises:
            MtpError: fewer positions than that are filled.
            RowsLostError: not all rows that the next pass reads are there. Going back to 0 is always possible.
        """
        ...

    def rows(self, name: str, filled_length: int | None = None) -> FloatArray:
        """Return a copy of the rows of the tensor `name` at the first `filled_length` positions, by default all that
        are filled; the last ones alone where the cache keeps no more. Shapes: [1, G, n, D]."""
        ...

    def restore(self, rows: dict[str, FloatArray]) -> None:
        """Replace everything by rows that `rows()` returned, of every tensor. Shapes: [1, G, n, D] each.

        Raises:
            MtpError: a tensor is missing, or of another shape.
        """
        ...


class Backend(Protocol):
    """An opened bundle, ready to run.

    Every implementation passes the conformance classes in `backend_tests.py` among the tests, on an exported bundle:
    LiteRT (for a CPU and for a GPU) and ONNX Runtime do.
    """

    @property
    def kv_cache(self) -> KVCache:
        """The one KV cache of this bundle, shared by the target and the drafter."""
        ...

    @property
    def embed_ms(self) -> float:
        """Time spent on looking up embeddings since the bundle was opened, which is part of every pass."""
        ...

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Process tokens without reading their logits, and advance the cache by their number.

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
        before it; at later steps both come from the step before. The cache stays as it is throughout a round. Where a
        verify of K + 1 tokens would pass the end of the cache or of a ring, the draft may be token 0.

        Shapes: activations [H].
        """
        ...

    def close(self) -> None:
        """Release the graphs and buffers; closing twice is harmless."""
        ...
