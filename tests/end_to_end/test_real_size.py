"""E2B at its true widths with an eighth of its layers, as a fine-tuner has it, by `benchmarks/real_size.py`: all but
the figures."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import real_size


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
