"""Questions about lists, and about formats: JSON, CSV, tables, bullets."""

from __future__ import annotations

import json
import random

from tools.train_nano import lexicon
from tools.train_nano.exchanges.exchange import LARGEST, Exchange, listed, pick

COUNTS = ("zero", "one", "two", "three", "four", "five", "six")


def lists(rng: random.Random) -> Exchange:
    """Ask to sort, reverse, count or begin a list."""
    task = rng.choice(["sort", "sort", "reverse", "first", "last", "count", "name", "numbers"])
    words = rng.sample([word for word in lexicon.NOUNS if " " not in word], rng.randint(3, 5))
    text = ", ".join(words)
    thought = f"The list has {len(words)} words."
    if task == "name":
        category = rng.choice(["animal", "plant", "food", "tool", "vehicle", "instrument"])
        count = rng.randint(2, 5)
        known = [word for word, entry in lexicon.NOUNS.items() if entry[1] == category][:count]
        plural = "foods" if category == "food" else f"{category}s"
        question = pick(rng, f"Name {COUNTS[count]} {plural}.", f"List {COUNTS[count]} {plural}.")
        answer = f"{listed(known)}."
        return Exchange(kind="lists", question=question, answer=answer.capitalize(), thought=f"I know {plural}.")
    if task == "numbers":
        values = rng.sample(range(LARGEST + 1), rng.randint(3, 5))
        question = pick(
            rng,
            f"Sort these numbers: {', '.join(map(str, values))}.",
            f"Put these numbers in order: {', '.join(map(str, values))}.",
        )
        answer = ", ".join(map(str, sorted(values)))
        return Exchange(kind="lists", question=question, answer=answer, thought="The smallest comes first.")
    if task == "sort":
        question = pick(rng, f"Sort these words: {text}.", f"Put these words in alphabetical order: {text}.")
        answer, word = ", ".join(sorted(words)), None
    elif task == "reverse":
        question = pick(rng, f"Reverse this list: {text}.", f"Write this list backwards: {text}.")
        answer, word = ", ".join(reversed(words)), None
    elif task == "count":
        question = pick(rng, f"How many words are in this list: {text}?", f"Count these words: {text}.")
        answer, word = f"The list has {len(words)} words.", str(len(words))
    else:
        chosen = words[0] if task == "first" else words[-1]
        question = pick(rng, f"What is the {task} word of this list: {text}?", f"Which word is {task} here: {text}?")
        answer, word = f"The {task} word is {chosen}.", chosen
    return Exchange(kind="lists", question=question, answer=answer, thought=thought, word=word)


def formats(rng: random.Random) -> Exchange:
    """Ask to write values in a format."""
    syntax = rng.choice(["json", "json", "csv", "bullets", "numbered", "table", "array"])
    name, age = rng.choice(lexicon.NAMES), rng.randint(1, LARGEST)
    city = rng.choice(list(lexicon.CAPITALS.values()))
    words = rng.sample([word for word in lexicon.NOUNS if " " not in word], rng.randint(2, 4))
    if syntax == "json":
        question = pick(
            rng,
            f"Write as JSON: {name} is {age} years old and lives in {city}.",
            f"Turn this into JSON: {name} is {age} years old and lives in {city}.",
            f"Give me JSON for name {name}, age {age}, city {city}.",
        )
        answer = json.dumps({"name": name, "age": age, "city": city})
    elif syntax == "csv":
        question = f"Write as CSV with a header: name {name}, age {age}, city {city}."
        answer = f"name,age,city\n{name},{age},{city}"
    elif syntax == "table":
        question = f"Write as a Markdown table: name {name}, age {age}."
        answer = f"| name | age |\n|---|---|\n| {name} | {age} |"
    elif syntax == "array":
        question = pick(rng, f"Write as a JSON list: {', '.join(words)}.", f"Turn into a JSON array: {listed(words)}.")
        answer = json.dumps(words)
    else:
        marks = ["- "] * len(words) if syntax == "bullets" else [f"{n + 1}. " for n in range(len(words))]
        sort = "bullet" if syntax == "bullets" else "numbered"
        question = pick(rng, f"Write as a {sort} list: {', '.join(words)}.", f"Make a {sort} list of {listed(words)}.")
        answer = "\n".join(mark + word for mark, word in zip(marks, words, strict=True))
    return Exchange(kind="formats", question=question, answer=answer, thought="The format is what counts here.")
