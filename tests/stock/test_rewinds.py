"""Rings of sliding layers in stock LiteRT-LM: they change no answer, and where a text was taken back by more than they
hold, the answer ends. It is never another one."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mtp_export.bundle import litertlm
from mtp_export.bundle.metadata import llm_metadata
from mtp_runtime.bundle.contract import read_manifest
from tests.conftest import Export
from tests.stock.scripts import Script, answers, run_scripts
from tools.runtime_matrix.probe import QUESTIONS

RING = 512
WINDOW = 128
LONGEST_PASS = 128
K = 4
CONTEXT = 1000  # shorter than the rings of the bundle without short ones: these are never full
LONG = 2000
DRAFTS = [pytest.param(False, id="plain"), pytest.param(True, id="drafts")]
Run = Callable[..., list[list[Any]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run scripts on a bundle."""

    def run_on(bundle: Path, scripts: list[Script], *, drafts: bool, context: int = CONTEXT) -> list[list[Any]]:
        container = bundle / "nano.litertlm" if bundle.is_dir() else bundle
        return run_scripts(tmp_path, container, scripts, context=context, drafts=drafts)

    return run_on


def around_the_end(offsets: range, ring_end: int) -> list[Script]:
    """Sessions in which a prefill of 128 rows, one of 16 and an answer begin so far before the end of a ring."""
    scripts: list[Script] = []
    for offset in offsets:
        first = ring_end - offset
        # The last token of a prompt waits for the next pass.
        scripts.append([["prompt", first, 13 * offset], ["prompt", 150, 7 * offset + 3000], ["answer", 20]])
        scripts.append([["prompt", first, 17 * offset], ["prompt", 9, 5 * offset + 3000], ["answer", 20]])
        scripts.append([["prompt", first, 19 * offset], ["answer", 40]])
    return scripts


@pytest.mark.parametrize(
    ("recipe", "context", "offsets", "ring_end"),
    [
        ("f32", CONTEXT, range(1, LONGEST_PASS + 8, 27), RING),
        pytest.param("f32", LONG, range(LONGEST_PASS + 8), RING, marks=pytest.mark.long),
        pytest.param("int8", LONG, range(LONGEST_PASS + 8), RING, marks=pytest.mark.long),
        pytest.param("int8", LONG, range(0, LONGEST_PASS + 8, 5), 3 * RING, marks=pytest.mark.long),
    ],
)
def test_rings_change_no_answer(
    export_nano: Export, run: Run, recipe: str, context: int, offsets: range, ring_end: int
) -> None:
    scripts = around_the_end(offsets, ring_end)
    rings = export_nano(recipe, export_format="tflite-rings")
    without = export_nano(recipe, export_format="tflite" if context <= CONTEXT else "tflite-whole")
    expected = run(without, scripts, drafts=False, context=context)
    assert run(rings, scripts, drafts=False, context=context) == expected
    drafted = run(rings, scripts, drafts=True, context=context)
    for script, plain, other in zip(scripts, expected, drafted, strict=True):
        (short,), (text,) = answers(script, plain), answers(script, other)
        assert text.startswith(short), script  # of the last round, all tokens are kept


@pytest.mark.parametrize(
    ("recipe", "starts", "messages"),
    [("f32", 2, 14), pytest.param("int8", 12, 40, marks=pytest.mark.long)],
)
def test_rings_change_no_chat(export_nano: Export, run: Run, recipe: str, starts: int, messages: int) -> None:
    """Replies that end by themselves, so that the tokens held are equal with drafts too, through the ends of rings."""
    context = CONTEXT if messages < 20 else LONG
    scripts: list[Script] = [
        [
            ["chat", {"max_output_tokens": 96, "system_message": "word " * (200 + 5 * n)}],
            *(["message", text] for text in (QUESTIONS * 5)[n : n + messages]),
        ]
        for n in range(starts)
    ]
    rings = export_nano(recipe, export_format="tflite-rings")
    without = export_nano(recipe, export_format="tflite" if context <= CONTEXT else "tflite-whole")
    expected = run(without, scripts, drafts=False, context=context)
    assert all(results[-1][2] > RING + WINDOW for results in expected)
    assert run(rings, scripts, drafts=False, context=context) == expected
    assert run(rings, scripts, drafts=True, context=context) == expected


def rewound(first: int, further: int) -> Script:
    """A session that goes on by so many tokens, and an answer, is taken back, and goes on with three other turns."""
    return [
        ["prompt", first, 0],
        ["save", "here"],
        ["prompt", further, 2000],
        ["answer", 24],
        ["rewind", "here"],
        ["prompt", 20, 3000],
        ["answer", 24],
        ["prompt", 9, 3100],
        ["answer", 24],
        ["prompt", 180, 3300],
        ["answer", 24],
    ]


# Answers cross no end of a ring: drafts are held back there, so that other tokens are in the last round, which is kept.
# What a pass wrote behind the place that a text is taken back to, and what the window reads before it, must fit. The
# answer of 24 tokens is written too, and of the last round and of the last prefill all rows.
KEPT = RING - WINDOW - 24 - K - 1
FURTHER = (20, 250, KEPT - 20)
TOO_FAR = (RING - WINDOW + 1, 500)


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("first", [300, pytest.param(580, marks=pytest.mark.long)])
def test_a_text_that_is_taken_back(export_nano: Export, run: Run, first: int, drafts: bool) -> None:
    """By as much as rings hold: as without them. By more: empty answers, of all turns that follow."""
    rings, without = (
        export_nano("f32", export_format=name)
        for name in ("tflite-rings", "tflite" if first == 300 else "tflite-whole")
    )
    scripts = [rewound(first, further) for further in (*FURTHER, *TOO_FAR)]
    context = 1024 if first == 300 else LONG
    results = (run(bundle, scripts, drafts=drafts, context=context) for bundle in (rings, without))
    of_rings, expected = ([answers(*one) for one in zip(scripts, result, strict=True)] for result in results)
    for number, (texts, others) in enumerate(zip(of_rings, expected, strict=True)):
        before, *after = texts
        assert before == others[0] != ""
        if number < len(FURTHER):
            assert after == others[1:], scripts[number]
            assert all(after)
        else:
            assert after == ["", "", ""], scripts[number]


# Messages and replies as they are, without anything between them.
RAW = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"


def thinking_aloud(bundle: Path, container: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a `.litertlm` for which all that follows a line is a thought, which LiteRT-LM takes back."""
    manifest = read_manifest(bundle)
    inner = msgspec.structs.replace(manifest, files={k: v for k, v in manifest.files.items() if k != "litertlm"})

    def other(path: Path, manifest: Any) -> Any:
        metadata = llm_metadata(path, manifest)
        metadata.channels[0].start, metadata.channels[0].end = "\n", "<never>"
        return metadata

    with monkeypatch.context() as patch:
        patch.setattr(litertlm, "llm_metadata", other)
        litertlm.write_litertlm(bundle, inner, container)
    return container


@pytest.mark.parametrize("drafts", DRAFTS)
def test_a_conversation_takes_a_long_thought_back(
    export_nano: Export, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafts: bool
) -> None:
    source = inspect.getsource(textwrap)
    texts = (source[:900], source[3000:3200], source[4000:4100])
    lengths = (150, 400)  # of thoughts: the last is longer than rings of 512 with a window of 128 hold
    scripts: list[Script] = [
        [["chat", {"chat_template": RAW, "max_output_tokens": most}], *(["message", text] for text in texts)]
        for most in lengths
    ]
    rings, without = (
        thinking_aloud(export_nano("f32", export_format=name), tmp_path / f"{name}.litertlm", monkeypatch)
        for name in ("tflite-rings", "tflite")
    )
    of_rings, expected = (run(bundle, scripts, drafts=drafts, context=1024) for bundle in (rings, without))
    for number, (turns, others) in enumerate(zip(of_rings, expected, strict=True)):
        first, *after = (thought for _, thought, _ in turns)
        assert len(first) > lengths[number]
        if number < len(lengths) - 1:
            assert turns == others
        else:
            assert turns[0][1].startswith(others[0][1][: lengths[number]])
            assert after == ["", ""]
            assert all(thought for _, thought, _ in others)
