"""E2B at its true widths with an eighth of its layers: as a fine-tuner has it, by `benchmarks/real_size.py`, all but
the figures; and its contexts in stock LiteRT-LM."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import real_size
from mtp_runtime.bundle.contract import read_manifest
from tests.stock.scripts import Script, answers, run_scripts

SHORT, LONG = 1024, 32000
ROOMS = (16, 22, 60)  # tokens left for an answer in the short context
WITHOUT_END = 100_000


@pytest.mark.real_size
def test_an_eighth_of_e2b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # the benchmark changes it
    sizes = {"model": "e2b", "target": "tflite", "recipe": "int4", "depth": "1/8", "finetune": True}
    options = argparse.Namespace(**sizes, folder=tmp_path, threads=2, keep=False)
    figures = real_size.measure(options)
    assert {phrase.partition(" (")[0] for phrase in figures["left_aside"]} >= {"vision tower", "`model_name`"}
    assert figures["export"]["peak_anonymous_bytes"] <= real_size.GOAL_BYTES
    assert figures["planned_over_written"] == pytest.approx(1.0, abs=0.01)
    assert figures["rounds"]["distinct_tokens"] > 8
    assert figures["rounds"]["same_output"], figures["rounds"]
    assert figures["stock"]["same_text"]
    assert [path.name for path in tmp_path.iterdir()] == ["e2b-1_of_8-finetune"]


@pytest.mark.long
@pytest.mark.real_size
def test_a_long_context_says_what_a_short_one_does(tmp_path: Path) -> None:
    """To the last token of the short one, drafts off and on; and in the long one over the end of a ring."""
    pair, bundle = tmp_path / "pair", tmp_path / "bundle"
    real_size.run("tools.synthesize", "--model", "e2b", "--depth", "1/8", "--output", str(pair))
    checkpoints = ("--checkpoint", str(pair / "target"), "--drafter", str(pair / "drafter"))
    arguments = ("--model", "e2b", "--recipe", "int4", *checkpoints, "--output", str(bundle))
    real_size.run("benchmarks.shallow", "export", *arguments)
    shutil.rmtree(pair)
    manifest = read_manifest(bundle)
    path = bundle / manifest.files["litertlm"].path

    def texts(scripts: list[Script], context: int, drafts: bool) -> list[str]:
        results = run_scripts(tmp_path, path, scripts, context=context, drafts=drafts)
        return [answers(script, result)[0] for script, result in zip(scripts, results, strict=True)]

    prompts: list[list[Any]] = [["prompt", SHORT - room - 1, 331 * room] for room in ROOMS]
    full: list[Script] = [[prompt, ["answer", WITHOUT_END]] for prompt in prompts]
    cut: list[Script] = [[prompt, ["answer", room]] for prompt, room in zip(prompts, ROOMS, strict=True)]
    over: list[Script] = [[["prompt", manifest.ring_length - 8, 0], ["answer", 24]]]
    expected = texts([*cut, *over], LONG, drafts=False)
    assert all(expected)
    assert texts(full, SHORT, drafts=False) == expected[: len(full)]
    assert texts(full, SHORT, drafts=True) == expected[: len(full)]
    for text, plain in zip(texts([*cut, *over], LONG, drafts=True), expected, strict=True):
        assert text.startswith(plain)  # with drafts the last round is whole
