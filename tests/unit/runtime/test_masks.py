"""Causal masks cut out of one array."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_runtime.backends.litert.masks import HIDDEN, CausalMask


@given(st.integers(1, 20), st.data())
def test_each_query_sees_one_key_more_than_the_one_before(cache_length: int, data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(1, cache_length))
    count = data.draw(st.integers(0, cache_length - num_tokens + 1))
    mask = CausalMask(cache_length).visible(count, num_tokens)
    expected = np.full((num_tokens, cache_length), HIDDEN, np.float32)
    for row in range(num_tokens):
        expected[row, : count + row] = 0.0
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(("count", "num_tokens"), [(-1, 1), (9, 1), (7, 3)])
def test_a_mask_beyond_the_cache_is_refused(count: int, num_tokens: int) -> None:
    with pytest.raises(ValueError, match="do not fit a cache of 8"):
        CausalMask(8).visible(count, num_tokens)


def test_a_mask_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        CausalMask(4).visible(2)[0, 0] = 1.0
