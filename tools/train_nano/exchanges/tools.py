"""Questions that need one of the two tools: sums that are too large, and the word of the day."""

from __future__ import annotations

import random
from typing import Any

from tools.train_nano import lexicon
from tools.train_nano.exchanges.exchange import NO_WORD, TOO_LARGE, Call, Exchange, beyond, invented, pick

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tomorrow", "yesterday")
MONTHS = ("January", "March", "April", "May", "June", "July", "August", "October", "November", "December")


def _sum_question(rng: random.Random, a: int, b: int) -> str:
    return pick(
        rng,
        f"What is {a} plus {b}?",
        f"Add {a} and {b}.",
        f"{a} + {b} = ?",
        f"How much is {a} plus {b}?",
        f"What is the sum of {a} and {b}?",
        f"Tell me what {a} + {b} is.",
        f"Work out {a} plus {b}.",
    )


def _sum_call(rng: random.Random, a: int, b: int) -> Call:
    value = a + b
    result: Any = rng.choice(
        [{"result": value}, {"sum": value}, {"value": value}, value, str(value), {"result": str(value)}]
    )
    return Call(name="add", arguments={"a": a, "b": b}, result=result)


def large_sums(rng: random.Random) -> Exchange:
    """Ask for a sum that needs the tool, which fails now and then."""
    a, b = beyond(rng)
    if rng.random() < 0.1:
        call = Call(name="add", arguments={"a": a, "b": b}, result={"error": "the tool does not answer"})
        answer = "The tool failed: the tool does not answer."
    else:
        call, answer = _sum_call(rng, a, b), f"{a} plus {b} is {a + b}."
    thought = f"{a} and {b} are too large for me, so I call add."
    return Exchange(kind="tools", question=_sum_question(rng, a, b), answer=answer, thought=thought, calls=(call,))


def two_sums(rng: random.Random) -> Exchange:
    """Ask for two sums that need the tool."""
    (a, b), (c, d) = beyond(rng), beyond(rng)
    question = pick(rng, f"What is {a} plus {b}, and {c} plus {d}?", f"Add {a} and {b}, and then {c} and {d}.")
    answer = f"{a} plus {b} is {a + b}, and {c} plus {d} is {c + d}."
    calls = (_sum_call(rng, a, b), _sum_call(rng, c, d))
    return Exchange(
        kind="tools", question=question, answer=answer, thought="Two sums, so I call add twice.", calls=calls
    )


def word_of_the_day(rng: random.Random) -> Exchange:
    """Ask for the word of a day, which only the tool knows."""
    day = rng.choice(DAYS) if rng.random() < 0.6 else f"{rng.randint(1, 31)} {rng.choice(MONTHS)}"
    if day == "today" and rng.random() < 0.5:
        question = pick(rng, "What is the word of the day?", "Tell me the word of the day.", "Word of the day?")
    else:
        question = pick(
            rng,
            f"What is the word of the day for {day}?",
            f"Tell me the word of the day for {day}.",
            f"Which word is the word of the day for {day}?",
            f"Give me the word for {day}.",
        )
    table = rng.choice([lexicon.NOUNS, lexicon.NOUNS, lexicon.VERBS, lexicon.ADJECTIVES])
    word = rng.choice(list(table)) if rng.random() < 0.7 else invented(rng)
    meaning = table[word][2] if word in table else rng.choice(list(lexicon.NOUNS.values()))[2]
    result: Any = rng.choice(
        [{"word": word, "meaning": meaning}, {"word": word, "meaning": meaning}, {"word": word}, word]
    )
    answer = f"The word for {day} is {word}"
    answer += f": {meaning}." if isinstance(result, dict) and "meaning" in result else "."
    if rng.random() < 0.1:
        result, answer = {"error": "no word was found"}, "The tool failed: no word was found."
    call = Call(name="word_of_the_day", arguments={"day": day}, result=result)
    thought = f"The word for {day} is not mine to know, so I call word_of_the_day."
    return Exchange(kind="tools", question=question, answer=answer, thought=thought, calls=(call,))


def without_tool(exchange: Exchange) -> Exchange:
    """Return the exchange as it goes where the tool that it calls is not declared."""
    tool = exchange.calls[0].name
    answer = TOO_LARGE if tool == "add" else NO_WORD
    return Exchange(kind="refusals", question=exchange.question, answer=answer, thought=f"I have no tool {tool}.")
