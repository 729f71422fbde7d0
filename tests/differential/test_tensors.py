"""How tools name and store the tensors of a checkpoint: layouts, wrappers, heads, dtypes, buffers, parts of towers."""

from __future__ import annotations

import pytest

from tests.differential import tensor_contents
from tests.differential.oracle import (
    assert_transformers_agrees,
    exported,
    nano_pair,
    planned,
)
from tests.differential.tensor_layouts import HEAD, HEAD_EQUAL, SUITE
from tests.differential.transformation import Record

__all__ = ["SUITE", "tensor_contents"]  # which adds to the suite


@pytest.mark.parametrize(
    "name",
    [
        "head_trained_apart_under_a_config_that_says_tied",
        "head_alone_stored",
        "drafter_with_a_head_trained_apart",
    ],
)
def test_in_onnx_too(name: str) -> None:
    """Where head and embedding are is all that differs by format."""
    with nano_pair() as pair:
        SUITE.cases[name].change(pair)
        run, _ = exported(pair, "onnx")
        assert_transformers_agrees(run, pair)


@pytest.mark.parametrize("name", ["tied_head_stored_too", "with_both_towers", "saved_again_by_transformers"])
def test_a_plan_lists_the_same(name: str) -> None:
    """But that head and embedding are equal, which takes reading them."""
    with nano_pair() as pair:
        SUITE.cases[name].change(pair)
        expected = [
            words.replace(HEAD_EQUAL, f"{HEAD}, if it equals the embedding") for words in SUITE.cases[name].words
        ]
        assert list(planned(pair).left_aside) == expected


@pytest.mark.parametrize("name", SUITE.cases)
def test_transformation(name: str, record_property: Record) -> None:
    SUITE.run(name, record_property)
