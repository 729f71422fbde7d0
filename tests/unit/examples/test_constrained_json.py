"""The grammar of examples/constrained_json.py: what it lets through is JSON, and JSON gets through."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from examples.constrained_json import DONE, START, JsonObject, advance, read, shortest_end

ALPHABET = '{}[]:,"\\ -.0159truefalsn\n\ufffdé'
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.decimals(-99, 99, places=2).map(float) | st.text('aé"\\/ \n'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("ab\n", max_size=3), VALUES, max_size=3))
def test_every_object_gets_through(value: object) -> None:
    assert read(START, json.dumps(value, ensure_ascii=False)) == DONE
    assert read(START, json.dumps(value, ensure_ascii=False, separators=(",", ":"))) == DONE


@given(st.lists(st.floats(0.0, 1.0, exclude_max=True), max_size=60))
def test_every_path_through_the_grammar_ends_within_its_shortest_end(choices: list[float]) -> None:
    text, state = "", START
    for choice in choices:
        following = [(char, after) for char in ALPHABET if (after := advance(state, char)) is not None]
        if not following:
            break
        char, state = following[int(choice * len(following))]
        text += char
    while state != DONE:
        left = shortest_end(state)
        ends = [(char, after) for char in ALPHABET if (after := advance(state, char)) and shortest_end(after) < left]
        char, state = ends[0]
        text += char
    assert isinstance(json.loads(text), dict)


def test_the_mask_leaves_room_for_the_end() -> None:
    texts = ["", "{", '"', "}", '{"a": [[1', "1"]
    constraint = JsonObject(texts, [0], 8)
    # After `{"a": [[1` three characters and the stop token are to come: 5 tokens in all, one more than is left.
    assert np.flatnonzero(constraint([])).tolist() == [1, 4]
    assert np.flatnonzero(JsonObject(texts, [0], 4)([])).tolist() == [1]
    assert np.flatnonzero(constraint([1, 3])).tolist() == [0]
