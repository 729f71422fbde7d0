"""Questions about small Python code and shell commands."""

from __future__ import annotations

import random

from tools.train_nano import snippets
from tools.train_nano.exchanges.exchange import Exchange, pick


def code(rng: random.Random) -> Exchange:
    """Ask for a function, a value, a meaning, an exception or a shell command."""
    which = rng.choice(["function", "function", "expression", "expression", "meaning", "error", "shell"])
    word = None
    if which == "function":
        name, purpose, source = rng.choice(snippets.FUNCTIONS)
        question = pick(
            rng,
            f"Write a Python function that {purpose}.",
            f"Write the Python function {name}, which {purpose}.",
            f"I need a Python function that {purpose}.",
            f"Show me Python code that {purpose}.",
        )
        answer, thought = f"```python\n{source}\n```", f"The function {name} {purpose}."
    elif which == "expression":
        expression, word = rng.choice(snippets.EXPRESSIONS)
        question = pick(
            rng,
            f"What does {expression} give in Python?",
            f"What is the value of {expression}?",
            f"Evaluate {expression} in Python.",
        )
        answer, thought = f"{expression} gives {word}.", f"Python evaluates {expression}."
    elif which == "meaning":
        name, meaning = rng.choice(snippets.MEANINGS)
        question = pick(
            rng, f"What is {name} in Python?", f"What does {name} mean in Python?", f"Explain Python's {name}."
        )
        answer, thought = f"In Python, {name} is {meaning}.", f"The Python word {name}."
    elif which == "error":
        name, condition = rng.choice(snippets.ERRORS)
        question = pick(rng, f"When does Python raise {name}?", f"What does a {name} tell me?", f"Explain {name}.")
        answer, thought = f"Python raises {name} when {condition}.", f"The exception {name}."
    else:
        purpose, command = rng.choice(snippets.SHELL)
        question = pick(rng, f"Which shell command {purpose}?", f"Give me the shell command that {purpose}.")
        answer, word, thought = f"The command is `{command}`.", None, f"A command that {purpose}."
    return Exchange(kind="code", question=question, answer=answer, thought=thought, word=word)
