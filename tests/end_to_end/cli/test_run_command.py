"""`mtp-export run` as a user meets it: its options say what the same request in Python would."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_runtime import Sampling, Session
from tests.conftest import Export, run_cli
from tests.end_to_end.cli.test_cli import refused
from tests.support.places import ROOT

PROMPT = "def add(a, b):"
# Each of them changes what nano says.
EVERY_OPTION = Sampling(temperature=0.9, top_k=5, top_p=0.8, seed=2, repetition_penalty=1.3, method="speculative")
AS_ARGUMENTS = (
    *("--temperature", "0.9", "--top-k", "5", "--top-p", "0.8", "--seed", "2"),
    *("--repetition-penalty", "1.3", "--sampling-method", "speculative"),
)


@pytest.fixture(scope="module")
def bundle(export_nano: Export) -> Path:
    return export_nano("int8")


def test_the_webgpu_provider_refuses_a_bundle_for_litert(bundle: Path) -> None:
    assert "export it with --format onnx" in refused("run", str(bundle), PROMPT, "--provider", "webgpu")


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    with Session.open(bundle) as opened:
        yield opened


def said(session: Session, sampling: Sampling) -> tuple[int, ...]:
    return session.generate(PROMPT, max_new_tokens=24, sampling=sampling).finish().tokens


def run(bundle: Path, *arguments: str) -> tuple[int, ...]:
    done = run_cli("run", str(bundle), PROMPT, "--max-new-tokens", "24", "--json", *arguments)
    return tuple(json.loads(done.stdout)["tokens"])


def test_every_sampling_option_arrives(bundle: Path, session: Session) -> None:
    expected = said(session, EVERY_OPTION)
    for field in dataclasses.fields(Sampling):
        default: dict[str, Any] = {field.name: field.default}
        assert said(session, dataclasses.replace(EVERY_OPTION, **default)) != expected, (
            f"{field.name} makes no difference here, so nothing would be shown"
        )
    assert run(bundle, *AS_ARGUMENTS) == expected


def test_a_penalty_alone_stays_greedy(bundle: Path, session: Session) -> None:
    penalised = Sampling(temperature=0.0, repetition_penalty=1.3)
    assert said(session, penalised) != said(session, Sampling(temperature=0.0))
    assert run(bundle, "--repetition-penalty", "1.3") == said(session, penalised)
    assert run(bundle, "--repetition-penalty", "1.3", "--no-mtp") == said(session, penalised)


def test_the_text_ends_before_the_first_of_several_stop_texts(bundle: Path, session: Session) -> None:
    arguments = ("run", str(bundle), PROMPT, "--max-new-tokens", "24")
    whole = session.generate(PROMPT, max_new_tokens=24)
    whole.finish()
    first, later = whole.text[9:12], whole.text[14:16]
    expected = whole.text[: whole.text.index(first)]
    assert run_cli(*arguments).stdout == whole.text + "\n"
    assert run_cli(*arguments, "--stop", later, "--stop", first).stdout == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--temperature warm", "Invalid value for '--temperature': 'warm' is not a valid float."),
        ("--temperature -1", "temperature is -1.0: give 0 for greedy, or more"),
        ("--temperature nan", "temperature is nan: give 0 for greedy, or more"),
        ("--temperature 1 --top-k 0", "top_k is 0: give 1 or more"),
        ("--temperature 1 --top-p 0", "top_p is 0.0: give more than 0 and at most 1"),
        ("--temperature 1 --seed -1", "seed is -1: give 0 or more"),
        ("--repetition-penalty 0", "repetition_penalty is 0.0: give more than 0; 1 changes nothing"),
        (
            "--sampling-method ratio",
            "Invalid value for '--sampling-method': 'ratio' is not one of 'match', 'speculative'.",
        ),
        ("--top-k 5", "--top-k is for tokens that are drawn: give a --temperature above 0 too"),
        ("--top-p 1", "--top-p is for tokens that are drawn"),
        ("--temperature 0 --seed 0", "--seed is for tokens that are drawn"),
        ("--sampling-method match", "--sampling-method is for tokens that are drawn"),
        ("--no-mtp --num-draft-tokens 2", "--no-mtp and --num-draft-tokens contradict each other: give one"),
    ],
)
def test_wrong_options_are_refused_in_one_line_before_the_bundle_is_opened(arguments: str, message: str) -> None:
    assert refused("run", "there is no such bundle", PROMPT, *arguments.split()).startswith(message)


def test_an_empty_stop_text_is_refused() -> None:
    message = refused("run", "there is no such bundle", PROMPT, "--stop", "")
    assert message == "stop is ('',): give texts of at least one character"


TOOLS = ROOT / "examples/tools.json"


def test_a_chat_ends_and_a_tool_is_called(bundle: Path) -> None:
    done = run_cli("run", str(bundle), "--chat", "What does the verb climb mean?")
    assert done.stdout == "To climb is to go up something using hands and feet.\n"
    arguments = ("run", str(bundle), "--chat", "What is 231 plus 84?")
    assert run_cli(*arguments).stdout == "I only know sums up to 20.\n"
    assert run_cli(*arguments, "--tools", str(TOOLS)).stdout == "call:add{a:231,b:84}\n"


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (None, "cannot read the tools of"),
        ("[", "cannot read the tools of"),
        ("[" * 100_000, "cannot read the tools of"),
        ("[]", "declares no functions"),
        ('{"add": 1}', "declares no functions"),
        ('[{"function": {"parameters": {}}}]', "entry 1 of"),
        ('[{"function": {"name": "f"}}, {"function": {"name": "g", "parameters": 1}}]', "entry 2 of"),
        ("\udcff", "cannot read the tools of"),
    ],
)
def test_a_file_that_declares_no_tools_is_refused(tmp_path: Path, written: str | None, words: str) -> None:
    path = tmp_path / "tools.json"
    if written is not None:
        path.write_bytes(written.encode("utf-8", "surrogateescape"))
    assert words in refused("run", "there is no such bundle", PROMPT, "--chat", "--tools", str(path))


def test_tools_are_for_a_chat() -> None:
    assert "give --chat too" in refused("run", "there is no such bundle", PROMPT, "--tools", str(TOOLS))
