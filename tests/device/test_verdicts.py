"""Which answers of a place pass, fail, or show nothing. The answers are nano's own, from processes on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mtp_export.check.prompts import heldout_prompts, in_turn
from mtp_export.device.parity import compare, fixed_texts
from mtp_export.device.places import run_here
from mtp_export.device.protocol import Answer, Request, text_prompts
from mtp_export.device.report import EXIT_CODES, Check, DeviceReport
from mtp_export.device.runs import Job
from mtp_runtime.measure.teacher_forcing import Reading
from tests.conftest import Export, run_cli
from tests.end_to_end.golden.files import MAX_NEW_TOKENS, PROMPTS

NOISE = 0.2  # of a logit; two processors' logits of a quantised nano are up to 0.48 apart


@pytest.fixture(scope="module")
def bundle(export_nano: Export) -> Path:
    return export_nano("int8")


@pytest.fixture(scope="module")
def request_here(bundle: Path) -> Request:
    return request_of(bundle)


def request_of(bundle: Path, **changes: Any) -> Request:
    job = Job(
        bundle=bundle,
        where="host",
        serial=None,
        silence_s=1.0,
        binary=None,
        app=False,
        stock=False,
        backend="cpu",
        prompts=text_prompts(in_turn(heldout_prompts(), 4)),
        max_new_tokens=48,
        threads=1,
    )
    return msgspec.structs.replace(job.request(str(bundle)), texts=None, **changes)


@pytest.fixture(scope="module")
def here(request_here: Request) -> Answer:
    return run_here(request_here)


def rounded_otherwise(reading: Reading, noise: np.random.Generator) -> Reading:
    """As another processor reads the same graph: its logits are a little off, and so are some first choices."""
    logits = np.add(reading.logits, noise.uniform(-NOISE, NOISE, np.shape(reading.logits)))
    best = zip(reading.candidates, logits.argmax(axis=1), strict=True)
    return msgspec.structs.replace(
        reading,
        choices=tuple(ids[at] for ids, at in best),
        logits=tuple(tuple(row) for row in logits.tolist()),
    )


def other_place(here: Answer, **changes: Any) -> Answer:
    return msgspec.structs.replace(here, **changes)


def check(report: DeviceReport, reference: str) -> Check:
    return next(check for check in report.checks if check.reference == reference)


def test_a_place_reads_the_tokens_that_it_generates(here: Answer) -> None:
    assert [reading.choices for reading in here.readings] == [trace.tokens for trace in here.plain]
    for trace, reading in zip(here.plain, here.readings, strict=True):
        assert reading.margins == pytest.approx(trace.margins, abs=1e-6)


def test_a_right_bundle_on_another_processor_passes(bundle: Path, request_here: Request, here: Answer) -> None:
    noise = np.random.default_rng(1)
    readings = tuple(rounded_otherwise(reading, noise) for reading in here.readings)
    report = compare(bundle, request_here, here, other_place(here, readings=readings))
    same_text = check(report, "this machine, fed the same text")
    assert same_text.result.count("near_tie") > 0, "no first choice differs, so nothing is shown"
    assert same_text.distances is not None
    assert 0.1 < (same_text.distances.largest or 0) <= NOISE
    assert (report.outcome, EXIT_CODES[report.outcome]) == ("passed", 0)
    assert ": near-tie" in report.to_markdown()


def test_another_model_fails(bundle: Path, request_here: Request, here: Answer, export_nano: Export) -> None:
    """The weights of int4 in place of int8's: its own MTP is right, and its logits are not those of this bundle."""
    wrong = request_of(export_nano("int4"))
    there = run_here(msgspec.structs.replace(wrong, texts=fixed_texts(here)))
    report = compare(bundle, request_here, here, other_place(here, traces=there.traces, readings=there.readings))
    same_text, own = check(report, "this machine, fed the same text"), check(report, "itself without MTP")
    assert (own.outcome, same_text.outcome) == ("passed", "failed")
    assert same_text.result.count("different") > 0
    assert same_text.distances is not None
    assert (same_text.distances.median or 0) > 2 * same_text.tolerance
    assert (report.outcome, EXIT_CODES[report.outcome]) == ("failed", 1)
    assert "FAILED" in report.to_markdown()


def test_logits_that_are_off_everywhere_fail_even_if_every_choice_agrees(
    bundle: Path, request_here: Request, here: Answer
) -> None:
    doubled = tuple(
        msgspec.structs.replace(reading, logits=tuple(tuple(2 * x for x in row) for row in reading.logits))
        for reading in here.readings
    )
    report = compare(bundle, request_here, here, other_place(here, readings=doubled))
    assert check(report, "this machine, fed the same text").result.count("different") == 0
    assert report.outcome == "failed"
    assert "AT HALF OF THEM" in report.to_markdown()


def test_one_token_that_mtp_changes_fails(bundle: Path, request_here: Request, here: Answer) -> None:
    """Even where the two best logits are close: on the place itself there is no near-tie."""
    plain, drafted = here.traces
    prompt, at = min(
        ((p, i) for p, trace in enumerate(plain.traces) for i in range(len(trace.tokens))),
        key=lambda position: plain.traces[position[0]].margins[position[1]],
    )
    assert plain.traces[prompt].margins[at] < 0.05
    traces = list(drafted.traces)
    tokens = list(traces[prompt].tokens)
    tokens[at] += 1
    traces[prompt] = msgspec.structs.replace(traces[prompt], tokens=tuple(tokens))
    wrong = (plain, msgspec.structs.replace(drafted, traces=tuple(traces)))
    report = compare(bundle, request_here, here, other_place(here, traces=wrong))
    assert check(report, "itself without MTP").result.count("different") == 1
    assert report.outcome == "failed"


def test_nothing_compared_is_inconclusive(bundle: Path, request_here: Request, here: Answer) -> None:
    traces = tuple(
        msgspec.structs.replace(
            run, traces=tuple(msgspec.structs.replace(trace, tokens=(), margins=()) for trace in run.traces)
        )
        for run in here.traces
    )
    empty = Reading(choices=(), candidates=(), logits=())
    nothing = other_place(here, traces=traces, readings=(empty,) * len(here.readings))
    report = compare(bundle, request_here, nothing, other_place(nothing))
    assert (report.outcome, EXIT_CODES[report.outcome]) == ("inconclusive", 3)
    assert "no token was compared" in report.to_markdown()
    without_prompts = msgspec.structs.replace(request_here, prompts=())
    no_prompt = Answer(place=here.place)
    assert compare(bundle, without_prompts, no_prompt, Answer(place=here.place)).outcome == "inconclusive"


def test_the_command_on_this_machine(bundle: Path, tmp_path: Path) -> None:
    options = ("--where", "host", "--prompts", str(PROMPTS), "--max-new-tokens", str(MAX_NEW_TOKENS), "--json")
    done = run_cli("device", "parity", str(bundle), *options, "--output", str(tmp_path))
    report = json.loads(done.stdout)
    prompts = len(PROMPTS.read_text(encoding="utf-8").splitlines())
    assert report["outcome"] == "passed"
    checks = [(c["reference"], c["result"]["runner"], c["result"]["num_draft_tokens"]) for c in report["checks"]]
    assert checks == [
        ("itself without MTP", "mtp_runtime", 4),
        ("mtp_runtime without MTP", "LiteRT-LM", 0),
        ("itself without MTP", "LiteRT-LM", 4),
    ]
    for entry in report["checks"]:
        assert [comparison["verdict"] for comparison in entry["result"]["comparisons"]] == ["equal"] * prompts
    assert (tmp_path / "device-parity.md").read_text(encoding="utf-8").startswith("# Parity on a device: nano")
    short = ("--where", "host", "--limit", "1", "--max-new-tokens", "2", "--no-stock", "--output", str(tmp_path))
    done = run_cli("device", "parity", str(bundle), *short, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert "mtp_runtime, K = 4, against itself without MTP: no token was compared" in done.stdout
    done = run_cli("device", "parity", str(bundle), "--limit", "0", check=False)
    assert (done.returncode, done.stderr) == (2, "mtp-export: error: --limit is 0: give 1 or more\n")
