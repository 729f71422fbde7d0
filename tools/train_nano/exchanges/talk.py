"""Small talk, and questions that nano does not know the answer to."""

from __future__ import annotations

import random

from tools.train_nano import lexicon
from tools.train_nano.exchanges.exchange import LARGEST, TOO_LARGE, Exchange, a_or_an, beyond, invented, pick

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
    """Greet, thank, or ask nano about itself."""
    questions, answer = rng.choice(TALK)
    return Exchange(kind="talk", question=rng.choice(questions), answer=answer, thought="This is small talk.")


def unknown(rng: random.Random) -> Exchange:
    """Ask for something that nano does not know; the answer is a refusal."""
    topic = rng.choice(["word", "word", "question", "question", "sum"])
    if topic == "word":
        word = invented(rng)
        question = pick(
            rng,
            f"What does {word} mean?",
            f"Define {word}.",
            f"What is {a_or_an(word)}?",
            f"What does the verb {word} mean?",
            f"Explain the word {word}.",
        )
        return Exchange(
            kind="refusals",
            question=question,
            answer=f"I do not know the word {word}.",
            thought=f"{word} is new to me.",
        )
    if topic == "question":
        question = rng.choice(lexicon.UNKNOWABLE)
        return Exchange(kind="refusals", question=question, answer="I do not know that.", thought="I cannot know this.")
    a, b = beyond(rng)
    while max(a, b) <= LARGEST:
        a, b = beyond(rng)
    sign = rng.choice(["minus", "times", "divided by"])
    question = pick(rng, f"What is {a} {sign} {b}?", f"How much is {a} {sign} {b}?")
    return Exchange(kind="refusals", question=question, answer=TOO_LARGE, thought=f"{a} and {b} are too large for me.")
