"""One bundle serves every context that an app chooses, to its last token: drafts off, drafts on, and a longer context
that is cut there, say the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mtp_runtime.bundle.contract import read_manifest
from tests.conftest import Export
from tests.stock.scripts import Script, answers, run_scripts
from tools.runtime_matrix.probe import QUESTIONS

LONGEST = 4096
# Multiples of 256, of 64, of 8; below and above the window of 128, and of that and a verify.
CONTEXTS = (128, 200, 256, 300, 1000, 1024, 2040, LONGEST)
SOME = (200, 300, 1000)
PREFILL = 16  # the shortest: nearer to the end a prompt cannot come
# Tokens left for the answer. Rounds end everywhere among the last tokens, and begin where drafts are held back.
ROOMS = (PREFILL, 17, 18, 19, 20, 21, 23, 25, 30, 33, 40, 47, 64, 65, 100, 120)
SOME_ROOMS = (PREFILL, 17, 19, 22, 25, 47, 100)
WITHOUT_END = 100_000
CHAT = {"max_output_tokens": 96}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Prompts of one bundle, each with the context and the room that it leaves."""

    recipe: str
    contexts: tuple[int, ...]
    rooms: tuple[int, ...]

    def prompts(self, context: int) -> list[list[Any]]:
        """Return prompts that leave each room, and one of a few tokens; the start token takes a slot too."""
        rooms = [*self.rooms, *([context - 5] if context <= 300 else [])]
        return [["prompt", context - room - 1, 331 * n] for n, room in enumerate(rooms)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(Case(recipe="f32", contexts=SOME, rooms=SOME_ROOMS), id="some-f32"),
        pytest.param(Case(recipe="int8", contexts=(200, 1000), rooms=SOME_ROOMS[::2]), id="some-int8"),
        pytest.param(Case(recipe="f32", contexts=CONTEXTS, rooms=ROOMS), id="all-f32", marks=pytest.mark.long),
        pytest.param(Case(recipe="int8", contexts=CONTEXTS, rooms=ROOMS), id="all-int8", marks=pytest.mark.long),
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture(scope="module")
def bundle(case: Case, export_nano: Export) -> Path:
    return export_nano(case.recipe) / "nano.litertlm"


def room(context: int, prompt: list[Any]) -> int:
    return context - int(prompt[1]) - 1


@pytest.fixture(scope="module")
def expected(case: Case, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """Answers by context: what the longest one says without drafts, as far as there is room."""
    places = [(context, prompt) for context in case.contexts for prompt in case.prompts(context)]
    scripts: list[Script] = [[prompt, ["answer", room(context, prompt)]] for context, prompt in places]
    results = run_scripts(tmp_path_factory.mktemp("run"), bundle, scripts, context=LONGEST, drafts=False)
    by_context: dict[int, list[str]] = {}
    for (context, prompt), result in zip(places, results, strict=True):
        assert len(result[1]) == room(context, prompt), "an answer that ends by itself shows nothing"
        by_context.setdefault(context, []).append("".join(result[1]))
    return by_context


@pytest.mark.parametrize("drafts", [False, True])
def test_answers_to_the_last_token(
    case: Case, bundle: Path, expected: dict[int, list[str]], tmp_path: Path, drafts: bool
) -> None:
    for context in case.contexts:
        scripts: list[Script] = [[prompt, ["answer", WITHOUT_END]] for prompt in case.prompts(context)]
        results = run_scripts(tmp_path, bundle, scripts, context=context, drafts=drafts)
        texts = [answers(script, result)[0] for script, result in zip(scripts, results, strict=True)]
        assert texts == expected[context], context


@pytest.mark.parametrize(
    ("recipe", "context", "messages"),
    [
        ("int8", 300, 12),
        pytest.param("f32", 200, 12, marks=pytest.mark.long),
        pytest.param("f32", 1000, 40, marks=pytest.mark.long),
        pytest.param("int8", 1000, 40, marks=pytest.mark.long),
    ],
)
def test_chats_until_the_context_is_full(
    export_nano: Export, tmp_path: Path, recipe: str, context: int, messages: int
) -> None:
    """Turn by turn, to a last reply that is cut, and no further: the same replies, and the same tokens held."""
    bundle = export_nano(recipe) / "nano.litertlm"
    texts = QUESTIONS * 4
    scripts: list[Script] = [
        [["chat", CHAT], *(["message", text] for text in texts[n : n + messages])] for n in range(2)
    ]
    plain, drafted = (
        run_scripts(tmp_path, bundle, scripts, context=context, drafts=drafts) for drafts in (False, True)
    )
    assert plain == drafted
    whole = run_scripts(tmp_path, bundle, scripts, context=LONGEST, drafts=False)
    for results, longer in zip(plain, whole, strict=True):
        replies = [result[0] for result in results if isinstance(result, list) and result[0]]
        assert len(replies) < messages, "it was never full"
        *before, last = replies
        assert before == [result[0] for result in longer[: len(before)]]
        assert longer[len(before)][0].startswith(last)


def test_contexts_that_are_tiny_or_too_long(export_nano: Export, tmp_path: Path) -> None:
    """From the shortest prefill on, an answer fills the context; below, prompts are refused. Above the exported length,
    the context is the largest multiple of 256 within it; without a number, the default."""
    bundle = export_nano("int8")
    manifest = read_manifest(bundle)

    def last_result(context: int | None, drafts: bool, tokens: int) -> Any:
        scripts: list[Script] = [[["prompt", tokens, 0], ["answer", WITHOUT_END]]]
        results = run_scripts(tmp_path, bundle / "nano.litertlm", scripts, context=context, drafts=drafts)
        return results[0][-1]

    for context in (PREFILL, 32):
        plain, drafted = last_result(context, False, 5), last_result(context, True, 5)
        assert len(plain) == context - 5 - 1
        assert "".join(plain) == "".join(drafted)
    assert last_result(PREFILL - 1, False, 5) == {"error": "litert_lm_session_run_prefill failed"}
    assert len(last_result(manifest.cache_length + 1000, False, LONGEST - 20)) == 20 - 1
    assert len(last_result(None, False, manifest.context_length - 20)) == 20 - 1
