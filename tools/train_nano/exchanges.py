"""Questions of nano's domain with their answers: words, facts, spelling, sums up to 20, lists, formats, small code, two
tools, and what it does not know. Written for this project (CC0); made from `lexicon.py` and `snippets.py`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.train_nano import lexicon, snippets

LARGEST = 20  # what nano counts to by itself
COUNTS = ("zero", "one", "two", "three", "four", "five", "six")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tomorrow", "yesterday")
MONTHS = ("January", "March", "April", "May", "June", "July", "August", "October", "November", "December")
TOO_LARGE = f"I only know sums up to {LARGEST}."
NO_WORD = "I do not know the word of the day."


@dataclass(frozen=True, kw_only=True)
class Call:
    """A tool's name, the arguments, and what the tool gives."""

    name: str
    arguments: Mapping[str, Any]
    result: Any


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A question and its answer; `word` is the whole answer where it is to be one word, `calls` come before it."""

    kind: str
    question: str
    answer: str
    thought: str
    word: str | None = None
    calls: tuple[Call, ...] = ()


Maker = Callable[[random.Random], Exchange]


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def invented(rng: random.Random) -> str:
    """A word that nobody knows: one of the lexicon's, or syllables."""
    if rng.random() < 0.4:
        return rng.choice(lexicon.UNKNOWN)
    syllables = [
        rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(["", "l", "n", "r", "s"]) for _ in "abc"
    ]
    word = "".join(syllables[: rng.choice([2, 3])])
    known = word in lexicon.NOUNS or word in lexicon.VERBS or word in lexicon.ADJECTIVES
    return word + "ix" if known else word


def _any_word(rng: random.Random) -> str:
    return rng.choice([*lexicon.NOUNS, *lexicon.VERBS, *lexicon.ADJECTIVES])


def _pick(rng: random.Random, *forms: str) -> str:
    return rng.choice(forms)


def define(rng: random.Random) -> Exchange:
    part = rng.choice(["noun", "noun", "verb", "adjective"])
    if part == "noun":
        word = rng.choice(list(lexicon.NOUNS))
        meaning = lexicon.NOUNS[word][2]
        question = _pick(
            rng,
            f"What is {_a(word)}?",
            f"Define {word}.",
            f"What does the noun {word} mean?",
            f"What does {word} mean?",
            f"Explain the word {word}.",
            f"Tell me what {_a(word)} is.",
        )
        answer = f"{_a(word).capitalize()} is {meaning}."
    elif part == "verb":
        word = rng.choice(list(lexicon.VERBS))
        meaning = lexicon.VERBS[word][2]
        question = _pick(
            rng,
            f"What does the verb {word} mean?",
            f"Define the verb {word}.",
            f"What does to {word} mean?",
            f"Explain the verb {word}.",
            f"What is it to {word}?",
        )
        answer = f"To {word} is {meaning}."
    else:
        word = rng.choice(list(lexicon.ADJECTIVES))
        meaning = lexicon.ADJECTIVES[word][2]
        question = _pick(
            rng,
            f"What does the adjective {word} mean?",
            f"Define the adjective {word}.",
            f"When is something {word}?",
            f"Explain the adjective {word}.",
        )
        answer = f"{word.capitalize()} means {meaning}."
    return Exchange(kind="words", question=question, answer=answer, thought=f"The word {word} is one that I know.")


def forms(rng: random.Random) -> Exchange:
    table = rng.choice(["plural", "past", "ing", "opposite", "comparative"])
    if table == "plural":
        word = rng.choice(list(lexicon.NOUNS))
        name, form = "plural", lexicon.NOUNS[word][0]
    elif table in ("past", "ing"):
        word = rng.choice(list(lexicon.VERBS))
        name, form = (
            ("past tense", lexicon.VERBS[word][0]) if table == "past" else ("-ing form", lexicon.VERBS[word][1])
        )
    else:
        word = rng.choice(list(lexicon.ADJECTIVES))
        name, form = (
            ("opposite" if table == "opposite" else "comparative"),
            lexicon.ADJECTIVES[word][table != "opposite"],
        )
    question = _pick(
        rng,
        f"What is the {name} of {word}?",
        f"Give me the {name} of {word}.",
        f"Say the {name} of {word}.",
        f"Which word is the {name} of {word}?",
    )
    answer = f"The {name} of {word} is {form}."
    thought = f"I am asked for the {name} of {word}, which is {form}."
    return Exchange(kind="words", question=question, answer=answer, thought=thought, word=form)


def categories(rng: random.Random) -> Exchange:
    word = rng.choice(list(lexicon.NOUNS))
    category = lexicon.NOUNS[word][1]
    sort = category if category in ("clothing", "furniture", "weather", "water", "food") else _a(category)
    thought = f"The word {word} names {sort}."
    if rng.random() < 0.4:
        question = _pick(rng, f"What kind of thing is {_a(word)}?", f"What sort of thing is {_a(word)}?")
        answer = f"{_a(word).capitalize()} is {sort}."
        return Exchange(kind="words", question=question, answer=answer, thought=thought, word=category)
    other = rng.choice(sorted({entry[1] for entry in lexicon.NOUNS.values()}))
    asked = category if rng.random() < 0.5 else other
    asked_sort = asked if asked in ("clothing", "furniture", "weather", "water", "food") else _a(asked)
    question = _pick(rng, f"Is {_a(word)} {asked_sort}?", f"Would you say that {_a(word)} is {asked_sort}?")
    answer = f"Yes, {_a(word)} is {sort}." if asked == category else f"No, {_a(word)} is {sort}."
    word_answer = "yes" if asked == category else "no"
    return Exchange(kind="words", question=question, answer=answer, thought=thought, word=word_answer)


def facts(rng: random.Random) -> Exchange:
    which = rng.choice(["sound", "colour", "capital", "country"])
    if which == "sound":
        animal, sound = rng.choice(list(lexicon.SOUNDS.items()))
        question = _pick(rng, f"What sound does {_a(animal)} make?", f"What does {_a(animal)} do to be heard?")
        answer, word = f"{_a(animal).capitalize()} {sound}.", sound
    elif which == "colour":
        thing, word = rng.choice(list(lexicon.COLOURS.items()))
        question = _pick(
            rng, f"What colour is {thing}?", f"Which colour has {thing}?", f"Tell me the colour of {thing}."
        )
        answer = f"The colour of {thing} is {word}."
    elif which == "capital":
        country, word = rng.choice(list(lexicon.CAPITALS.items()))
        question = _pick(
            rng,
            f"What is the capital of {country}?",
            f"Name the capital of {country}.",
            f"Which city is the capital of {country}?",
        )
        answer = f"The capital of {country} is {word}."
    else:
        word, capital = rng.choice(list(lexicon.CAPITALS.items()))
        question = _pick(rng, f"Of which country is {capital} the capital?", f"{capital} is the capital of what?")
        answer = f"{capital} is the capital of {word}."
    return Exchange(kind="facts", question=question, answer=answer, thought=f"I know this: {answer}", word=word)


def spelling(rng: random.Random) -> Exchange:
    word = _any_word(rng).replace(" ", "")
    which = rng.choice(["spell", "count", "first", "last"])
    letters = "-".join(word)
    thought = f"The letters are {letters}."
    if which == "spell":
        question = _pick(rng, f"Spell {word}.", f"How do you spell {word}?", f"Spell the word {word} for me.")
        return Exchange(kind="spelling", question=question, answer=letters, thought=f"I spell {word}.", word=letters)
    if which == "count":
        question = _pick(rng, f"How many letters does {word} have?", f"Count the letters of {word}.")
        answer = f"The word {word} has {len(word)} letters."
        return Exchange(kind="spelling", question=question, answer=answer, thought=thought, word=str(len(word)))
    letter = word[0] if which == "first" else word[-1]
    question = _pick(
        rng,
        f"What is the {which} letter of {word}?",
        f"Which letter comes {which} in {word}?",
        f"{which} letter of {word}?",
    )
    answer = f"The {which} letter of {word} is {letter}."
    return Exchange(kind="spelling", question=question, answer=answer, thought=thought, word=letter)


def sums(rng: random.Random) -> Exchange:
    which = rng.choice(["plus", "plus", "minus", "times"])
    a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
    if which == "plus":
        a, b = min(a, b), rng.randint(0, LARGEST - min(a, b))
        sign, value = "+", a + b
    elif which == "minus":
        a, b = max(a, b), min(a, b)
        sign, value = "-", a - b
    else:
        a = rng.randint(0, 10)
        b = rng.randint(0, LARGEST // a if a else 10)
        sign, value = "*", a * b
    if rng.random() < 0.5 and which != "minus":
        a, b = b, a
    question = _pick(
        rng,
        f"What is {a} {which} {b}?",
        f"{a} {sign} {b} = ?",
        f"How much is {a} {which} {b}?",
        f"Work out {a} {which} {b}.",
        f"Tell me what {a} {sign} {b} is.",
    )
    answer = f"{a} {which} {b} is {value}."
    thought = f"Small numbers: {a} {sign} {b} = {value}."
    return Exchange(kind="arithmetic", question=question, answer=answer, thought=thought, word=str(value))


def numbers(rng: random.Random) -> Exchange:
    a, b = rng.sample(range(LARGEST + 1), 2)
    which = rng.choice(["larger", "smaller", "after", "before", "even"])
    if which in ("larger", "smaller"):
        value = max(a, b) if which == "larger" else min(a, b)
        question = _pick(rng, f"Which is {which}, {a} or {b}?", f"Which number is {which}: {a} or {b}?")
        answer, word = f"{value} is {which} than {a + b - value}.", str(value)
    elif which in ("after", "before"):
        a = min(max(a, 1), LARGEST - 1)
        value = a + 1 if which == "after" else a - 1
        question = _pick(rng, f"Which number comes {which} {a}?", f"What comes {which} {a}?")
        answer, word = f"The number {which} {a} is {value}.", str(value)
    else:
        sort = "even" if a % 2 == 0 else "odd"
        question = _pick(rng, f"Is {a} even or odd?", f"Is the number {a} odd or even?")
        answer, word = f"The number {a} is {sort}.", sort
    return Exchange(kind="arithmetic", question=question, answer=answer, thought=f"Numbers up to {LARGEST}.", word=word)


def counting(rng: random.Random) -> Exchange:
    start = rng.randint(0, 14)
    end = rng.randint(start + 2, min(LARGEST, start + 9))
    rising = rng.random() < 0.7
    values = list(range(start, end + 1)) if rising else list(range(end, start - 1, -1))
    question = _pick(
        rng,
        f"Count from {values[0]} to {values[-1]}.",
        f"Count {'up' if rising else 'down'} from {values[0]} to {values[-1]}.",
        f"Write the numbers from {values[0]} to {values[-1]}.",
    )
    answer = ", ".join(map(str, values))
    return Exchange(kind="lists", question=question, answer=answer, thought=f"From {values[0]} to {values[-1]}.")


def lists(rng: random.Random) -> Exchange:
    which = rng.choice(["sort", "sort", "reverse", "first", "last", "count", "name", "numbers"])
    words = rng.sample([word for word in lexicon.NOUNS if " " not in word], rng.randint(3, 5))
    text = ", ".join(words)
    thought = f"The list has {len(words)} words."
    if which == "name":
        category = rng.choice(["animal", "plant", "food", "tool", "vehicle", "instrument"])
        count = rng.randint(2, 5)
        known = [word for word, entry in lexicon.NOUNS.items() if entry[1] == category][:count]
        plural = "foods" if category == "food" else f"{category}s"
        question = _pick(rng, f"Name {COUNTS[count]} {plural}.", f"List {COUNTS[count]} {plural}.")
        answer = f"{_listed(known)}."
        return Exchange(kind="lists", question=question, answer=answer.capitalize(), thought=f"I know {plural}.")
    if which == "numbers":
        values = rng.sample(range(LARGEST + 1), rng.randint(3, 5))
        question = _pick(
            rng,
            f"Sort these numbers: {', '.join(map(str, values))}.",
            f"Put these numbers in order: {', '.join(map(str, values))}.",
        )
        answer = ", ".join(map(str, sorted(values)))
        return Exchange(kind="lists", question=question, answer=answer, thought="The smallest comes first.")
    if which == "sort":
        question = _pick(rng, f"Sort these words: {text}.", f"Put these words in alphabetical order: {text}.")
        answer, word = ", ".join(sorted(words)), None
    elif which == "reverse":
        question = _pick(rng, f"Reverse this list: {text}.", f"Write this list backwards: {text}.")
        answer, word = ", ".join(reversed(words)), None
    elif which == "count":
        question = _pick(rng, f"How many words are in this list: {text}?", f"Count these words: {text}.")
        answer, word = f"The list has {len(words)} words.", str(len(words))
    else:
        chosen = words[0] if which == "first" else words[-1]
        question = _pick(rng, f"What is the {which} word of this list: {text}?", f"Which word is {which} here: {text}?")
        answer, word = f"The {which} word is {chosen}.", chosen
    return Exchange(kind="lists", question=question, answer=answer, thought=thought, word=word)


def formats(rng: random.Random) -> Exchange:
    which = rng.choice(["json", "json", "csv", "bullets", "numbered", "table", "array"])
    name, age = rng.choice(lexicon.NAMES), rng.randint(1, LARGEST)
    city = rng.choice(list(lexicon.CAPITALS.values()))
    words = rng.sample([word for word in lexicon.NOUNS if " " not in word], rng.randint(2, 4))
    if which == "json":
        question = _pick(
            rng,
            f"Write as JSON: {name} is {age} years old and lives in {city}.",
            f"Turn this into JSON: {name} is {age} years old and lives in {city}.",
            f"Give me JSON for name {name}, age {age}, city {city}.",
        )
        answer = json.dumps({"name": name, "age": age, "city": city})
    elif which == "csv":
        question = f"Write as CSV with a header: name {name}, age {age}, city {city}."
        answer = f"name,age,city\n{name},{age},{city}"
    elif which == "table":
        question = f"Write as a Markdown table: name {name}, age {age}."
        answer = f"| name | age |\n|---|---|\n| {name} | {age} |"
    elif which == "array":
        question = _pick(
            rng, f"Write as a JSON list: {', '.join(words)}.", f"Turn into a JSON array: {_listed(words)}."
        )
        answer = json.dumps(words)
    else:
        marks = ["- "] * len(words) if which == "bullets" else [f"{n + 1}. " for n in range(len(words))]
        sort = "bullet" if which == "bullets" else "numbered"
        question = _pick(
            rng, f"Write as a {sort} list: {', '.join(words)}.", f"Make a {sort} list of {_listed(words)}."
        )
        answer = "\n".join(mark + word for mark, word in zip(marks, words, strict=True))
    return Exchange(kind="formats", question=question, answer=answer, thought="The format is what counts here.")


def code(rng: random.Random) -> Exchange:
    which = rng.choice(["function", "function", "expression", "expression", "meaning", "error", "shell"])
    word = None
    if which == "function":
        name, what, source = rng.choice(snippets.FUNCTIONS)
        question = _pick(
            rng,
            f"Write a Python function that {what}.",
            f"Write the Python function {name}, which {what}.",
            f"I need a Python function that {what}.",
            f"Show me Python code that {what}.",
        )
        answer, thought = f"```python\n{source}\n```", f"The function {name} {what}."
    elif which == "expression":
        expression, word = rng.choice(snippets.EXPRESSIONS)
        question = _pick(
            rng,
            f"What does {expression} give in Python?",
            f"What is the value of {expression}?",
            f"Evaluate {expression} in Python.",
        )
        answer, thought = f"{expression} gives {word}.", f"Python evaluates {expression}."
    elif which == "meaning":
        name, what = rng.choice(snippets.MEANINGS)
        question = _pick(
            rng, f"What is {name} in Python?", f"What does {name} mean in Python?", f"Explain Python's {name}."
        )
        answer, thought = f"In Python, {name} is {what}.", f"The Python word {name}."
    elif which == "error":
        name, what = rng.choice(snippets.ERRORS)
        question = _pick(rng, f"When does Python raise {name}?", f"What does a {name} tell me?", f"Explain {name}.")
        answer, thought = f"Python raises {name} when {what}.", f"The exception {name}."
    else:
        what, command = rng.choice(snippets.SHELL)
        question = _pick(rng, f"Which shell command {what}?", f"Give me the shell command that {what}.")
        answer, word, thought = f"The command is `{command}`.", None, f"A command that {what}."
    return Exchange(kind="code", question=question, answer=answer, thought=thought, word=word)


TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hi.", "Hello, nano.", "Hi there!", "Hey.", "Good day."), "Hello! What can I do for you?"),
    (("Good morning!", "Good morning, nano."), "Good morning! What can I do for you?"),
    (("Good evening!", "Good evening, nano."), "Good evening! What can I do for you?"),
    (("Thank you.", "Thanks!", "Thank you very much.", "Thanks a lot."), "You are welcome."),
    (("Goodbye.", "Bye!", "See you.", "Good night."), "Goodbye!"),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself."),
        "I am nano, a very small language model.",
    ),
    (
        ("What can you do?", "What do you know?", "How can you help me?", "What can I ask you?", "Help."),
        "I know some words, sums up to 20, lists, formats and small Python code.",
    ),
    (("How are you?", "How are you today?", "How do you do?"), "I am well, thank you."),
    (("Are you a person?", "Are you human?", "Are you real?"), "No, I am a very small language model."),
    (("How old are you?", "When were you born?"), "I do not know that."),
    (("How large are you?", "How many parameters do you have?"), "I have about ten million parameters."),
    (("Yes.", "No.", "OK.", "Fine.", "I see."), "What else can I do for you?"),
    (("Tell me a joke.", "Make me laugh."), "Why did the token stop? Its turn was over."),
)


def talk(rng: random.Random) -> Exchange:
    questions, answer = rng.choice(TALK)
    return Exchange(kind="talk", question=rng.choice(questions), answer=answer, thought="This is small talk.")


def unknown(rng: random.Random) -> Exchange:
    which = rng.choice(["word", "word", "question", "question", "sum"])
    if which == "word":
        word = invented(rng)
        question = _pick(
            rng,
            f"What does {word} mean?",
            f"Define {word}.",
            f"What is {_a(word)}?",
            f"What does the verb {word} mean?",
            f"Explain the word {word}.",
        )
        return Exchange(
            kind="refusals",
            question=question,
            answer=f"I do not know the word {word}.",
            thought=f"{word} is new to me.",
        )
    if which == "question":
        question = rng.choice(lexicon.UNKNOWABLE)
        return Exchange(kind="refusals", question=question, answer="I do not know that.", thought="I cannot know this.")
    a, b = _beyond(rng)
    while max(a, b) <= LARGEST:
        a, b = _beyond(rng)
    sign = rng.choice(["minus", "times", "divided by"])
    question = _pick(rng, f"What is {a} {sign} {b}?", f"How much is {a} {sign} {b}?")
    return Exchange(kind="refusals", question=question, answer=TOO_LARGE, thought=f"{a} and {b} are too large for me.")


def _beyond(rng: random.Random) -> tuple[int, int]:
    """Two numbers whose sum nano does not know, one to five digits each."""
    a, b = (int(10 ** rng.uniform(0, 5)) for _ in "ab")
    return (a, b) if a + b > LARGEST else (a + LARGEST, b)


def _sum_question(rng: random.Random, a: int, b: int) -> str:
    return _pick(
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
    a, b = _beyond(rng)
    if rng.random() < 0.1:
        call = Call(name="add", arguments={"a": a, "b": b}, result={"error": "the tool does not answer"})
        answer = "The tool failed: the tool does not answer."
    else:
        call, answer = _sum_call(rng, a, b), f"{a} plus {b} is {a + b}."
    thought = f"{a} and {b} are too large for me, so I call add."
    return Exchange(kind="tools", question=_sum_question(rng, a, b), answer=answer, thought=thought, calls=(call,))


def two_sums(rng: random.Random) -> Exchange:
    (a, b), (c, d) = _beyond(rng), _beyond(rng)
    question = _pick(rng, f"What is {a} plus {b}, and {c} plus {d}?", f"Add {a} and {b}, and then {c} and {d}.")
    answer = f"{a} plus {b} is {a + b}, and {c} plus {d} is {c + d}."
    calls = (_sum_call(rng, a, b), _sum_call(rng, c, d))
    return Exchange(
        kind="tools", question=question, answer=answer, thought="Two sums, so I call add twice.", calls=calls
    )


def word_of_the_day(rng: random.Random) -> Exchange:
    day = rng.choice(DAYS) if rng.random() < 0.6 else f"{rng.randint(1, 31)} {rng.choice(MONTHS)}"
    if day == "today" and rng.random() < 0.5:
        question = _pick(rng, "What is the word of the day?", "Tell me the word of the day.", "Word of the day?")
    else:
        question = _pick(
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


def without_tool(exchange: Exchange) -> Exchange:
    """The exchange where the tool that it calls is not declared."""
    wanted = exchange.calls[0].name
    answer = TOO_LARGE if wanted == "add" else NO_WORD
    return Exchange(kind="refusals", question=exchange.question, answer=answer, thought=f"I have no tool {wanted}.")


def casual(rng: random.Random, question: str) -> str:
    """The question as people also type it."""
    roll = rng.random()
    if roll < 0.75:
        return question
    if roll < 0.82:
        return question[:-1] if question[-1] in ".?" else question
    if roll < 0.88:
        return question[0].lower() + question[1:]
    return rng.choice(["Hello! ", "Please: ", "A question: ", "Hi, nano. "]) + question
