"""Questions about words: meanings, forms, categories, spelling; and simple facts."""

from __future__ import annotations

import random
from collections.abc import Mapping

from tools.train_nano import lexicon
from tools.train_nano.exchanges.exchange import Exchange, a_or_an, pick

# Part of speech: its table, the questions, the answer.
_DEFINITIONS: Mapping[str, tuple[Mapping[str, lexicon.Entry], tuple[str, ...], str]] = {
    "noun": (
        lexicon.NOUNS,
        (
            "What is {a_word}?",
            "Define {word}.",
            "What does the noun {word} mean?",
            "What does {word} mean?",
            "Explain the word {word}.",
            "Tell me what {a_word} is.",
        ),
        "{a_word} is {meaning}.",
    ),
    "verb": (
        lexicon.VERBS,
        (
            "What does the verb {word} mean?",
            "Define the verb {word}.",
            "What does to {word} mean?",
            "Explain the verb {word}.",
            "What is it to {word}?",
        ),
        "to {word} is {meaning}.",
    ),
    "adjective": (
        lexicon.ADJECTIVES,
        (
            "What does the adjective {word} mean?",
            "Define the adjective {word}.",
            "When is something {word}?",
            "Explain the adjective {word}.",
        ),
        "{word} means {meaning}.",
    ),
}
_UNCOUNTED = ("clothing", "furniture", "weather", "water", "food")
# Form: the table, the column of the form, its name in a question.
_FORMS: Mapping[str, tuple[Mapping[str, lexicon.Entry], int, str]] = {
    "plural": (lexicon.NOUNS, 0, "plural"),
    "past": (lexicon.VERBS, 0, "past tense"),
    "ing": (lexicon.VERBS, 1, "-ing form"),
    "opposite": (lexicon.ADJECTIVES, 0, "opposite"),
    "comparative": (lexicon.ADJECTIVES, 1, "comparative"),
}


def define(rng: random.Random) -> Exchange:
    """Ask for the meaning of a word."""
    table, questions, answer = _DEFINITIONS[rng.choice(["noun", "noun", "verb", "adjective"])]
    word = rng.choice(list(table))
    names = {"word": word, "a_word": a_or_an(word), "meaning": table[word][2]}
    question, answer = rng.choice(questions).format(**names), answer.format(**names)
    answer = answer[0].upper() + answer[1:]
    return Exchange(kind="words", question=question, answer=answer, thought=f"The word {word} is one that I know.")


def forms(rng: random.Random) -> Exchange:
    """Ask for a form of a word."""
    table, column, name = _FORMS[rng.choice(list(_FORMS))]
    word = rng.choice(list(table))
    form = table[word][column]
    question = pick(
        rng,
        f"What is the {name} of {word}?",
        f"Give me the {name} of {word}.",
        f"Say the {name} of {word}.",
        f"Which word is the {name} of {word}?",
    )
    answer = f"The {name} of {word} is {form}."
    thought = f"I am asked for the {name} of {word}, which is {form}."
    return Exchange(kind="words", question=question, answer=answer, thought=thought, word=form)


def _sort(category: str) -> str:
    return category if category in _UNCOUNTED else a_or_an(category)


def categories(rng: random.Random) -> Exchange:
    """Ask what kind of thing a noun names, or whether it names one."""
    word = rng.choice(list(lexicon.NOUNS))
    category = lexicon.NOUNS[word][1]
    sort = _sort(category)
    thought = f"The word {word} names {sort}."
    if rng.random() < 0.4:
        question = pick(rng, f"What kind of thing is {a_or_an(word)}?", f"What sort of thing is {a_or_an(word)}?")
        answer = f"{a_or_an(word).capitalize()} is {sort}."
        return Exchange(kind="words", question=question, answer=answer, thought=thought, word=category)
    other = rng.choice(sorted({entry[1] for entry in lexicon.NOUNS.values()}))
    guess = category if rng.random() < 0.5 else other
    question = pick(
        rng, f"Is {a_or_an(word)} {_sort(guess)}?", f"Would you say that {a_or_an(word)} is {_sort(guess)}?"
    )
    answer = f"Yes, {a_or_an(word)} is {sort}." if guess == category else f"No, {a_or_an(word)} is {sort}."
    word_answer = "yes" if guess == category else "no"
    return Exchange(kind="words", question=question, answer=answer, thought=thought, word=word_answer)


def facts(rng: random.Random) -> Exchange:
    """Ask for a sound, a colour, a capital or its country."""
    topic = rng.choice(["sound", "colour", "capital", "country"])
    if topic == "sound":
        animal, sound = rng.choice(list(lexicon.SOUNDS.items()))
        question = pick(rng, f"What sound does {a_or_an(animal)} make?", f"What does {a_or_an(animal)} do to be heard?")
        answer, word = f"{a_or_an(animal).capitalize()} {sound}.", sound
    elif topic == "colour":
        thing, word = rng.choice(list(lexicon.COLOURS.items()))
        question = pick(
            rng, f"What colour is {thing}?", f"Which colour has {thing}?", f"Tell me the colour of {thing}."
        )
        answer = f"The colour of {thing} is {word}."
    elif topic == "capital":
        country, word = rng.choice(list(lexicon.CAPITALS.items()))
        question = pick(
            rng,
            f"What is the capital of {country}?",
            f"Name the capital of {country}.",
            f"Which city is the capital of {country}?",
        )
        answer = f"The capital of {country} is {word}."
    else:
        word, capital = rng.choice(list(lexicon.CAPITALS.items()))
        question = pick(rng, f"Of which country is {capital} the capital?", f"{capital} is the capital of what?")
        answer = f"{capital} is the capital of {word}."
    return Exchange(kind="facts", question=question, answer=answer, thought=f"I know this: {answer}", word=word)


def spelling(rng: random.Random) -> Exchange:
    """Ask for the letters of a word, their number, the first or the last."""
    word = rng.choice([*lexicon.NOUNS, *lexicon.VERBS, *lexicon.ADJECTIVES]).replace(" ", "")
    task = rng.choice(["spell", "count", "first", "last"])
    letters = "-".join(word)
    thought = f"The letters are {letters}."
    if task == "spell":
        question = pick(rng, f"Spell {word}.", f"How do you spell {word}?", f"Spell the word {word} for me.")
        return Exchange(kind="spelling", question=question, answer=letters, thought=f"I spell {word}.", word=letters)
    if task == "count":
        question = pick(rng, f"How many letters does {word} have?", f"Count the letters of {word}.")
        answer = f"The word {word} has {len(word)} letters."
        return Exchange(kind="spelling", question=question, answer=answer, thought=thought, word=str(len(word)))
    letter = word[0] if task == "first" else word[-1]
    question = pick(
        rng,
        f"What is the {task} letter of {word}?",
        f"Which letter comes {task} in {word}?",
        f"{task} letter of {word}?",
    )
    answer = f"The {task} letter of {word} is {letter}."
    return Exchange(kind="spelling", question=question, answer=answer, thought=thought, word=letter)
