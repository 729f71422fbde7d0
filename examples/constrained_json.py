"""Constrained decoding: a mask callback that lets only JSON objects through, with and without drafts.

    python examples/constrained_json.py BUNDLE

The constraint reads the text so far with an automaton of characters and allows a token if the text with it can still
become an object within the tokens that are left. Drafts that break the grammar are rejected like any other, so the
output is the same with MTP on and off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mtp_runtime import Sampling, Session

PROMPT = '{"name": "Ada", "year": 1815, "tags": ["poet", "maths"]}\n{"name": "Alan", "year": 1912, "tags": ["logic"]}\n'
MAX_NEW_TOKENS = 64

# What is open, outermost first, and what the next character belongs to. "=rue" is a literal of which "rue" is left.
State = tuple[str, str]
START: State = ("", "start")
DONE: State = ("", "end")
CLOSERS = {"{": "}", "[": "]"}
LITERALS = {"t": "=rue", "f": "=alse", "n": "=ull"}
# From a part of a number: where a digit leads, where a dot leads.
NUMBERS = {
    "-": ("digits", ""),
    "zero": ("", "dot"),
    "digits": ("digits", "dot"),
    "dot": ("tenths", ""),
    "tenths": ("tenths", ""),
}
# How many characters it takes at least to get from a mode to the end of the value that it belongs to.
SHORTEST = {"start": 2, "value": 1, "key": 4, "name": 3, "colon": 2, "string": 1, "-": 1, "dot": 1}


def advance(state: State, char: str) -> State | None:
    """Return the state after one more character, None if it cannot follow. No exponents and no \\u, for brevity."""
    stack, mode = state
    if mode.endswith("\\"):
        return (stack, mode[:-1]) if char in '"\\/bfnrt' else None
    if mode in ("string", "name"):
        if char == '"':
            return stack, "end" if mode == "string" else "colon"
        # U+FFFD is how a byte of an unfinished character reads.
        return None if char < " " or char == "\ufffd" else (stack, mode + "\\" * (char == "\\"))
    if mode.startswith("="):
        return (stack, mode[:1] + mode[2:] if mode[2:] else "end") if char == mode[1] else None
    if mode == "-" and char == "0":
        return stack, "zero"
    if mode in NUMBERS:
        following = NUMBERS[mode][0] if char in "0123456789" else NUMBERS[mode][1] if char == "." else ""
        if following:
            return stack, following
        if mode in SHORTEST:
            return None
        mode = "end"
    if char == " ":
        return None if (stack, mode) == DONE else (stack, mode)
    return between(stack, mode, char)


def between(stack: str, mode: str, char: str) -> State | None:
    """Return the state after a character outside strings, numbers and literals."""
    if mode == "start":
        return ("{", "member") if char == "{" else None
    if mode == "colon":
        return (stack, "value") if char == ":" else None
    if stack and mode in ("end", "member", "item") and char == CLOSERS[stack[-1]]:
        return stack[:-1], "end"
    if mode == "end":
        return (stack, "key" if stack[-1] == "{" else "value") if stack and char == "," else None
    if mode in ("member", "key"):
        return (stack, "name") if char == '"' else None
    if char in CLOSERS:
        return stack + char, "member" if char == "{" else "item"
    if char in LITERALS:
        return stack, LITERALS[char]
    mode_after = {'"': "string", "-": "-", "0": "zero"}.get(char, "digits" if char in "123456789" else "")
    return (stack, mode_after) if mode_after else None


def read(state: State | None, text: str) -> State | None:
    """Return the state after `text`."""
    for char in text:
        if state is None:
            return None
        state = advance(state, char)
    return state


def shortest_end(state: State) -> int:
    """Return how many characters it takes at least to end the object."""
    stack, mode = state
    own = mode.removesuffix("\\")
    return len(stack) + (len(mode) - 1 if mode.startswith("=") else SHORTEST.get(own, 0)) + (own != mode)


class JsonObject:
    """A constraint: the output is one JSON object, then a stop token, in at most `max_new_tokens` tokens."""

    def __init__(self, token_texts: Sequence[str], stop_token_ids: Sequence[int], max_new_tokens: int) -> None:
        """Take the text that each token adds; tokens without text are not allowed within the object."""
        self._texts = token_texts
        self._stops = list(stop_token_ids)
        self._max_new_tokens = max_new_tokens
        self._ends: dict[State, NDArray[np.int64]] = {}

    def __call__(self, output: Sequence[int]) -> NDArray[np.bool_]:
        """Return which tokens may follow. Shapes: [V]."""
        state = read(START, "".join(self._texts[token] for token in output))
        assert state is not None
        if state == DONE:
            allowed = np.zeros(len(self._texts), np.bool_)
            allowed[self._stops] = True
            return allowed
        if state not in self._ends:
            self._ends[state] = np.array([self._end_after(state, text) for text in self._texts])
        # Every character has a token of its own, so an end that is as many characters away can be reached.
        left = self._max_new_tokens - len(output) - 2  # this token, and the stop token
        return self._ends[state] <= left

    def _end_after(self, state: State, text: str) -> int:
        after = read(state, text) if text else None
        return sys.maxsize if after is None else shortest_end(after)


def main(arguments: list[str]) -> int:
    """Generate greedily and sampled, with and without drafts; return 1 if one is no JSON or drafts change it."""
    if len(arguments) != 1:
        print(__doc__)
        return 2
    with Session.open(arguments[0]) as session:
        texts = [session.detokenize([token]) for token in range(session.manifest.vocab_size)]
        constraint = JsonObject(texts, session.manifest.stop_token_ids, MAX_NEW_TOKENS)
        for sampling in (None, Sampling(temperature=0.7, repetition_penalty=1.1, seed=1)):
            outputs = []
            for drafts in (0, session.manifest.num_draft_tokens):
                trace = session.generate(
                    PROMPT,
                    max_new_tokens=MAX_NEW_TOKENS,
                    num_draft_tokens=drafts,
                    sampling=sampling,
                    constraint=constraint,
                ).finish()
                text = session.detokenize(trace.tokens)
                outputs.append(trace.tokens)
                print(f"K = {drafts}, {trace.stats.committed_per_round:.2f} committed a round: {json.loads(text)}")
            if outputs[0] != outputs[1]:
                print("the output differs with drafts")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
