"""Probabilities of sampling: processors as in transformers, the residual, the draw, and the range of each option."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtp_runtime.errors import UserError
from mtp_runtime.generate.sampling import Sampling, draw, penalised, probabilities, residual

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40, unique=True)


@settings(deadline=None)
@given(
    logits=LOGITS,
    tokens=st.lists(st.integers(0, 39), max_size=10),
    penalty=st.floats(0.5, 2.0),
    temperature=st.floats(0.1, 3.0),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.floats(0.05, 1.0),
)
def test_the_processors_are_those_of_transformers(
    logits: list[float], tokens: list[int], penalty: float, temperature: float, top_k: int | None, top_p: float
) -> None:
    import torch
    from transformers.generation import logits_process as hf

    tokens = [token % len(logits) for token in tokens]
    processors: list[Any] = [hf.TemperatureLogitsWarper(temperature)]
    if tokens:
        processors.insert(0, hf.RepetitionPenaltyLogitsProcessor(penalty))
    if top_k is not None:
        processors.append(hf.TopKLogitsWarper(top_k))
    processors.append(hf.TopPLogitsWarper(top_p))
    scores = torch.tensor([logits], dtype=torch.float64)
    for processor in processors:
        before = scores.softmax(-1)[0].sort(descending=True).values
        # Between equals, and where a sum meets top-p to the last bit, either choice is right, and ours is not theirs.
        assume((-before[before > 0].diff()).min() > 1e-9 if (before > 0).sum() > 1 else True)
        assume((before.cumsum(0) - top_p).abs().min() > 1e-9)
        scores = processor(torch.tensor([tokens]), scores)
    expected = scores.softmax(-1)[0].numpy()
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    ours = probabilities(penalised(np.array(logits), tokens, penalty), sampling)
    assert ours.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(ours, expected, atol=1e-9)


def test_disallowed_tokens_have_no_probability_even_where_top_k_is_larger_than_what_is_left() -> None:
    scores = np.array([1.0, -np.inf, 2.0, -np.inf], np.float32)
    for sampling in (Sampling(top_k=3), Sampling(top_p=0.999), Sampling(temperature=1e-30), Sampling(temperature=1e30)):
        p = probabilities(scores, sampling)
        assert (p[[1, 3]] == 0).all()
        assert p.sum() == pytest.approx(1.0)


def test_the_residual_is_what_p_has_beyond_q() -> None:
    p, ids = np.array([0.1, 0.2, 0.3, 0.4]), np.array([1, 3], np.int32)
    np.testing.assert_allclose(residual(p, ids, np.array([0.5, 0.2])), np.array([0.1, 0.0, 0.3, 0.2]) / 0.6)
    np.testing.assert_array_equal(residual(p, np.arange(4, dtype=np.int32), p), p)


def test_an_impossible_token_is_never_drawn() -> None:
    class Edge(np.random.Generator):
        def __init__(self, value: float) -> None:
            super().__init__(np.random.PCG64(0))
            self.value = value

        def random(self, *unused: object, **ignored: object) -> Any:
            return self.value

    p = np.array([0.0, 0.3, 0.0, 0.7, 0.0])
    assert [draw(p, Edge(value)) for value in (0.0, 0.29, 0.31, np.nextafter(1.0, 0.0))] == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: give 0 for greedy, or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0: give 1 or more"),
        ({"top_p": 0.0}, "top_p is 0.0: give more than 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"method": "best"}, "method is 'best': give one of match, speculative"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**options)
