"""The words of the glossary: values are named by nouns, and one idea has one word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("converter", "runtime_py", "calibration", "tools", "benchmarks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "android_demo").glob("*.md")))

# A value is a thing, so its name is a noun: result, request, expected, match, reply, text.
NO_NOUNS = frozenset(
    {"said", "told", "asked", "found", "given", "wanted", "what", "whose", "whom", "which", "says", "tells"}
)

# Words that the glossary replaces, with the word to use. The pattern allows what other libraries call so.
WORDS = {
    r"main model": "target",
    r"assistant model": "drafter",
    r"\bgamma\b(?!\s*[=(])": "num_draft_tokens, K",
    r"look-?ahead(?! slots)": "num_draft_tokens, K",
    r"roll(ed|s|ing)?[- ]?back": "rewind",
    r"masked embedder": "clustered head",
    r"clustered embedder": "clustered head",
    r"\bschemes?\b": "recipe",
}
# Public names of other libraries, each with its owner. They are taken out before the words are looked for.
FOREIGN = {
    "ordered_embeddings": "transformers' key for a clustered head",
    "quantization scheme": "compressed-tensors' word",
}
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)


def value_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every value that is assigned, passed or looped over."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every docstring, and of every help text of an option."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                yield node.body[0].lineno, text
        elif isinstance(node, ast.keyword) and node.arg in ("help", "help_text"):
            for part in ast.walk(node.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def replaced_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line, counted from 0, and the hint for every word of the text that the glossary replaces."""
    for name in FOREIGN:
        text = text.replace(name, "")
    for pattern, word in WORDS.items():
        for match in re.finditer(pattern, text, re.IGNORECASE):
            yield text.count("\n", 0, match.start()), f"{match[0]!r}: the glossary's word is {word}"


def listed(failures: list[str]) -> None:
    if failures:
        pytest.fail("\n" + "\n".join(failures), pytrace=False)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_uses_the_glossary(path: Path) -> None:
    """Its values are named by nouns, and its docstrings and help texts have one word for an idea."""
    tree, name = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT)
    failures = [f"{name}:{line}: {value}" for line, value in value_names(tree) if NO_NOUNS & set(value.split("_"))]
    failures += [f"{name}:{line + n}: {hint}" for line, text in texts(tree) for n, hint in replaced_words(text)]
    listed(failures)


def test_pages_use_the_glossary() -> None:
    failures = []
    for path in PAGES:
        text = CODE.sub(lambda match: "\n" * match[0].count("\n"), path.read_text(encoding="utf-8"))
        failures += [f"{path.relative_to(ROOT)}:{line + 1}: {hint}" for line, hint in replaced_words(text)]
    listed(failures)
