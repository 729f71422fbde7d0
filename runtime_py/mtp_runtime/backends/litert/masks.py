"""Causal attention masks, cut out of one array instead of being filled in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Added to the score of a hidden key: exp() of it is 0, and added twice (mask and window) it stays finite in float32.
HIDDEN = -1e9


class CausalMask:
    """Additive masks over a cache of S positions: 0 where a key is visible, `HIDDEN` where it is not.

    The mask of a query at position p is S - (p + 1) steps into the array [0] * S + [HIDDEN] * S, and each following
    query starts one element earlier: every mask is a window into that one array. A query past the end sees all keys.
    """

    def __init__(self, cache_length: int, past_end: int = 0) -> None:
        """Prepare masks over `cache_length` positions, and so many of queries past the end."""
        self._length, self._most = cache_length, cache_length + past_end
        self._strip = np.zeros(self._most + cache_length, np.float32)
        self._strip[self._most :] = HIDDEN
        self._strip.flags.writeable = False

    def visible(self, count: int, num_tokens: int = 1) -> NDArray[np.float32]:
        """Return the mask whose first query sees the first `count` keys, and each later one a key more.

        A read-only view of this object's memory, valid for as long as it lives.

        Shapes: result [T, S], T = num_tokens; contiguous for T = 1.

        Raises:
            ValueError: a query is further past the end, or sees fewer keys than none.
        """
        if count < 0 or count + num_tokens - 1 > self._most:
            raise ValueError(f"{num_tokens} queries from {count} keys do not fit a cache of {self._length}")
        if num_tokens == 1:
            return self._strip[None, self._most - count : self._most + self._length - count]
        # Ten times cheaper than as_strided, and it checks its bounds.
        mask: NDArray[np.float32] = np.ndarray(
            (num_tokens, self._length), np.float32, self._strip, 4 * (self._most - count), (-4, 4)
        )
        return mask
