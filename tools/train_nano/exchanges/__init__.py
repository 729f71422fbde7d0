"""Questions of nano's domain with their answers: words, facts, spelling, sums up to 20, lists, formats, small code, two
tools, and the limits of its knowledge. Written for this project (CC0); made from the tables of `tables/`.

A maker draws one exchange. The order of its draws is part of the data: changing it changes every later conversation.
"""

from __future__ import annotations

import random

from tools.train_nano.exchanges.code import code
from tools.train_nano.exchanges.exchange import Maker
from tools.train_nano.exchanges.lists import formats, lists
from tools.train_nano.exchanges.numbers import counting, numbers, sums
from tools.train_nano.exchanges.talk import talk, unknown
from tools.train_nano.exchanges.tools import large_sums, two_sums, word_of_the_day
from tools.train_nano.exchanges.words import categories, define, facts, forms, spelling

PLAIN: tuple[tuple[Maker, float], ...] = (
    (define, 5.0),
    (forms, 3.0),
    (categories, 4.0),
    (facts, 2.0),
    (spelling, 2.0),
    (sums, 3.0),
    (numbers, 1.5),
    (counting, 1.0),
    (lists, 4.0),
    (formats, 2.5),
    (code, 5.0),
    (talk, 1.5),
    (unknown, 3.5),
)
WITH_TOOLS: tuple[tuple[Maker, float], ...] = ((large_sums, 4.0), (two_sums, 1.0), (word_of_the_day, 3.0))


def casual(rng: random.Random, question: str) -> str:
    """Draw the question as people also type it."""
    roll = rng.random()
    if roll < 0.75:
        return question
    if roll < 0.82:
        return question[:-1] if question[-1] in ".?" else question
    if roll < 0.88:
        return question[0].lower() + question[1:]
    return rng.choice(["Hello! ", "Please: ", "A question: ", "Hi, nano. "]) + question
