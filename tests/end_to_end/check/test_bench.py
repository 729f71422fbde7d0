"""`mtp-export bench` on nano in both formats, and the arithmetic of break-even."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mtp_runtime.measure.timing import break_even, expected_committed, round_ms
from tests.conftest import Export, run_cli

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("export_format", "sizes"),
    [("tflite", ["decode", "verify_5"]), ("onnx", ["decode", *(f"verify_{n}" for n in range(2, 6))])],
)
def test_every_part_of_a_round_is_timed(
    export_format: str, sizes: list[str], export_nano: Export, tmp_path: Path
) -> None:
    bundle, drawing = export_nano("int8", export_format=export_format), tmp_path / "rounds.svg"
    options = ("--threads", "1", "--filled", "200", "--new-tokens", "64", "--repeats", "8")
    done = run_cli("bench", str(bundle), *options, "--output", str(drawing), "--json")
    assert done.stderr == ""
    report = json.loads(done.stdout)
    passes = {name: timing["median_ms"] for name, timing in report["passes"].items()}
    assert list(passes) == ["prefill_200", *sizes, "draft", "head"]
    assert 0 < passes["head"] < passes["draft"] < passes["decode"]
    plain, *rounds = report["rounds"]
    assert (plain["num_draft_tokens"], plain["committed_per_round"]) == (0, 1.0)
    accepted = {measured["alpha"]: measured["acceptance_rate"] for measured in rounds}
    assert (accepted[0.0], accepted[1.0]) == (0.0, 1.0)
    assert accepted[0.2] < accepted[0.8]
    for measured in rounds:
        assert 0 < measured["ms_per_token"] < 10 * plain["ms_per_token"]
    picture = ElementTree.fromstring(drawing.read_text())
    pays = [even for even in report["break_even"].values() if even is not None]
    assert len(picture.findall(f"{SVG}circle")) == len(pays)
    assert len(picture.findall(f"{SVG}polyline")) == len(report["break_even"]) == 4


def test_mistakes_end_the_command_before_a_bundle_is_opened(tmp_path: Path) -> None:
    done = run_cli("bench", "nowhere", "--output", str(tmp_path / "no" / "rounds.svg"), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mtp-export: error: cannot write ")


def test_passes_at_the_end_of_a_ring_are_refused(export_nano: Export) -> None:
    """A verify is two passes there, and nothing is drafted."""
    bundle = str(export_nano("f32", export_format="tflite-rings"))
    command = ("bench", bundle, "--threads", "1", "--repeats", "3", "--new-tokens", "8", "--filled")
    done = run_cli(*command, "509", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    message = "with 509 tokens filled, the context, or a ring of 512, ends within 5 tokens, where nothing is drafted"
    assert done.stderr == f"mtp-export: error: {message}: fill 504 instead\n"
    run_cli(*command, "504")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("k", [1, 4])
def test_break_even_is_where_a_round_takes_as_long_as_the_tokens_it_commits(alpha: float, k: int) -> None:
    decode_ms = 2.0
    assert break_even(decode_ms, decode_ms * expected_committed(alpha, k), k) == pytest.approx(alpha, abs=1e-3)


def test_rounds_that_never_pay() -> None:
    assert break_even(1.0, 5.01, 4) is None


def test_a_round_takes_the_smallest_verify_that_holds_its_drafts() -> None:
    passes = {"decode": 1.0, "verify_3": 2.0, "verify_5": 3.0, "draft": 0.5}
    assert [round_ms(passes, k) for k in (1, 2, 3, 4)] == [2.5, 3.0, 4.5, 5.0]
