"""Questions about numbers up to 20: sums, comparisons, counting."""

from __future__ import annotations

import random

from tools.train_nano.exchanges.exchange import LARGEST, Exchange, pick


def sums(rng: random.Random) -> Exchange:
    """Ask for a sum, a difference or a product of numbers up to 20."""
    operation = rng.choice(["plus", "plus", "minus", "times"])
    a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
    if operation == "plus":
        a, b = min(a, b), rng.randint(0, LARGEST - min(a, b))
        sign, value = "+", a + b
    elif operation == "minus":
        a, b = max(a, b), min(a, b)
        sign, value = "-", a - b
    else:
        a = rng.randint(0, 10)
        b = rng.randint(0, LARGEST // a if a else 10)
        sign, value = "*", a * b
    if rng.random() < 0.5 and operation != "minus":
        a, b = b, a
    question = pick(
        rng,
        f"What is {a} {operation} {b}?",
        f"{a} {sign} {b} = ?",
        f"How much is {a} {operation} {b}?",
        f"Work out {a} {operation} {b}.",
        f"Tell me what {a} {sign} {b} is.",
    )
    answer = f"{a} {operation} {b} is {value}."
    thought = f"Small numbers: {a} {sign} {b} = {value}."
    return Exchange(kind="arithmetic", question=question, answer=answer, thought=thought, word=str(value))


def numbers(rng: random.Random) -> Exchange:
    """Ask which number is larger, comes next, or is even."""
    a, b = rng.sample(range(LARGEST + 1), 2)
    relation = rng.choice(["larger", "smaller", "after", "before", "even"])
    if relation in ("larger", "smaller"):
        value = max(a, b) if relation == "larger" else min(a, b)
        question = pick(rng, f"Which is {relation}, {a} or {b}?", f"Which number is {relation}: {a} or {b}?")
        answer, word = f"{value} is {relation} than {a + b - value}.", str(value)
    elif relation in ("after", "before"):
        a = min(max(a, 1), LARGEST - 1)
        value = a + 1 if relation == "after" else a - 1
        question = pick(rng, f"Which number comes {relation} {a}?", f"What comes {relation} {a}?")
        answer, word = f"The number {relation} {a} is {value}.", str(value)
    else:
        sort = "even" if a % 2 == 0 else "odd"
        question = pick(rng, f"Is {a} even or odd?", f"Is the number {a} odd or even?")
        answer, word = f"The number {a} is {sort}.", sort
    return Exchange(kind="arithmetic", question=question, answer=answer, thought=f"Numbers up to {LARGEST}.", word=word)


def counting(rng: random.Random) -> Exchange:
    """Ask to count up or down."""
    start = rng.randint(0, 14)
    end = rng.randint(start + 2, min(LARGEST, start + 9))
    rising = rng.random() < 0.7
    values = list(range(start, end + 1)) if rising else list(range(end, start - 1, -1))
    question = pick(
        rng,
        f"Count from {values[0]} to {values[-1]}.",
        f"Count {'up' if rising else 'down'} from {values[0]} to {values[-1]}.",
        f"Write the numbers from {values[0]} to {values[-1]}.",
    )
    answer = ", ".join(map(str, values))
    return Exchange(kind="lists", question=question, answer=answer, thought=f"From {values[0]} to {values[-1]}.")
