"""Stock LiteRT-LM on a device: by a program pushed there, by the wheel there, and the error where there is no app."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mtp_export.check.bench import BenchReport
from mtp_export.check.prompts import read_prompts
from mtp_export.device.adb import FOLDER, Adb, AdbError
from mtp_export.device.app import read_report
from mtp_export.device.bench import DeviceBench
from mtp_export.device.binary import parse_output
from mtp_runtime.bundle.bundle import sha256_of
from mtp_runtime.bundle.contract import MANIFEST_NAME
from mtp_runtime.errors import BackendError
from mtp_runtime.measure.profile import Profile
from tests.conftest import Export, run_cli
from tests.end_to_end.golden.files import MAX_NEW_TOKENS, PROMPTS
from tools.arm64_device.place import SERIAL, Place

PROGRAM = Path(__file__).with_name("litert_lm_main.py")
RUN = ("--prompts", str(PROMPTS), "--max-new-tokens", str(MAX_NEW_TOKENS), "--threads", "1", "--json")


@pytest.mark.arm64
def test_a_program_on_the_device_generates_the_same(place: Place, export_nano: Export, tmp_path: Path) -> None:
    bundle, device = export_nano("int8"), Adb.open()
    folder = f"{FOLDER}/bundles/{sha256_of(bundle / MANIFEST_NAME)[:16]}"
    device.shell(f"mkdir -p {folder} && touch {folder}/old.xnnpack_cache {folder}/old.bin")
    options = ("--binary", str(PROGRAM), "--limit", "1", "--output", str(tmp_path))
    done = run_cli("device", "parity", str(bundle), *options, *RUN)
    report = json.loads(done.stdout)
    assert (report["place"]["where"], report["place"]["cpu"]) == ("arm64-emulated", "cortex-a76")
    checks = [(c["reference"], c["result"]["runner"], c["result"]["num_draft_tokens"]) for c in report["checks"]]
    here = "this machine without MTP"
    assert checks == [(here, "LiteRT-LM", 0), ("itself without MTP", "LiteRT-LM", 4)]
    results = [check["result"] for check in report["checks"]]
    assert all([c["verdict"] for c in r["comparisons"]] == ["equal"] for r in results)
    assert results[1]["committed_per_round"] > 1.5, "MTP runs there, but its drafts are not accepted"
    assert {r["tokens_per_second"] for r in results} == {None}
    assert "the reference runtime: --binary and --app run LiteRT-LM alone" in report["left_out"]
    there = device.shell(f"ls {folder}").splitlines()
    assert "old.bin" in there
    assert "old.xnnpack_cache" not in there
    assert any("mtp_drafter" in name for name in there), "the program keeps no caches, so deleting them shows nothing"


@pytest.mark.arm64
def test_the_complaint_of_a_program_that_fails_is_reported(place: Place, export_nano: Export, tmp_path: Path) -> None:
    program = tmp_path / "wrong"
    program.write_text("#!/bin/sh\necho 'ERROR: Unknown command line flag' >&2; exit 1\n", encoding="utf-8")
    done = run_cli("device", "parity", str(export_nano("int8")), "--binary", str(program), check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "/wrong ended with 1: ERROR: Unknown command line flag" in done.stderr


@pytest.mark.arm64
def test_bench_withholds_what_an_emulated_cpu_takes(place: Place, export_nano: Export, tmp_path: Path) -> None:
    options = ("--repetitions", "1", "--limit", "1", "--output", str(tmp_path))
    report = json.loads(run_cli("device", "bench", str(export_nano("int8")), *options, *RUN).stdout)
    assert [(kind["kind"], kind["prompts"], kind["same_text"]) for kind in report["kinds"]] == [
        ("all", 1, 1),
        ("code", 1, 1),
    ]
    plain, drafted = report["variants"]
    assert (plain["num_draft_tokens"], plain["acceptance_rate"]) == (0, None)
    assert drafted["acceptance_rate"] > 0.2
    assert drafted["peak_memory_bytes"] > 20e6
    assert report["thermal"] == ["unknown", "unknown"]
    assert any(note.startswith("times are withheld") for note in report["notes"])
    assert not list(_times(report)), "an emulated CPU's times are in the report"
    assert (report["passes"], report["rounds"], report["break_even"]) == ({}, [], {})
    assert msgspec.json.decode((tmp_path / "device-bench.json").read_bytes(), type=DeviceBench)


def _times(value: Any, name: str = "") -> typing.Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _times(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _times(item, name)
    elif value is not None and (name.endswith(("_ms", "_s", "_gain")) or "per_second" in name):
        yield f"{name} = {value}"


@pytest.mark.arm64
def test_the_app_needs_a_phone(place: Place, export_nano: Export) -> None:
    bundle = str(export_nano("int8"))
    done = run_cli("device", "parity", bundle, "--app", check=False)
    assert done.stderr == f"mtp-export: error: {SERIAL} has no am and so no apps: --app needs an Android phone\n"
    done = run_cli("device", "bench", bundle, "--where", "phone", "--app", check=False)
    assert done.stderr == (
        f"mtp-export: error: {SERIAL} is the emulated ARM64 place, and no phone: leave out --where phone\n"
    )


def test_bench_here_is_a_profile(export_nano: Export, tmp_path: Path) -> None:
    bundle = export_nano("int8")
    options = ("--where", "host", "--repetitions", "2", "--output", str(tmp_path))
    report = msgspec.json.decode(run_cli("device", "bench", str(bundle), *options, *RUN).stdout, type=DeviceBench)
    everything, *kinds = report.kinds
    assert everything.mtp_gain
    assert min(kind.mtp_gain or 0 for kind in kinds) <= everything.mtp_gain <= max(kind.mtp_gain or 0 for kind in kinds)
    assert report.passes["decode"].runs == 2 * len(read_prompts(PROMPTS))
    plain, drafted = report.rounds
    assert plain.committed_per_round == 1.0
    assert plain.ms_per_token == pytest.approx(report.passes["decode"].median_ms, rel=1)
    assert 1.5 < drafted.committed_per_round < 5
    # Both commands write the type that a report reads.
    assert issubclass(DeviceBench, Profile)
    assert issubclass(BenchReport, Profile)
    assert list(report.rounds_ms) == [4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--where", "phone"), "a phone has no Python: run LiteRT-LM there with --app or --binary PATH"),
        (("--app", "--binary", "x"), "--app and --binary were both given"),
        (("--where", "host", "--binary", "x"), "--binary needs a device, and --where host is this machine"),
        (("--app", "--no-stock"), "--app runs LiteRT-LM alone, and --no-stock leaves it out"),
    ],
)
def test_options_that_contradict_each_other(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = run_cli("device", "parity", str(tmp_path), *options, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert message in done.stderr


def test_the_output_of_a_program_is_read() -> None:
    figures = (
        "BenchmarkInfo:\n  Time to first token: 0.92 s\n    Decode Turn 1: Processed 88 tokens in 8.7s duration.\n"
    )
    figures += "      Decode Speed: 10.00 tokens/sec.\n"
    for output, log in (("output: a\n\nb\n\n", figures), ("output: a\n\nb\n\n\n" + figures, "I0000 x.cc:1] loaded\n")):
        parsed = parse_output(output, log)
        assert parsed.text.startswith("a\n\nb")
        assert (parsed.num_tokens, parsed.decode_ms, parsed.first_token_ms) == (88, 8800.0, 920.0)
        assert parsed.prompt_ids is None
    with pytest.raises(BackendError, match=r"no text, decode speed or .*: E: no memory: take"):
        parse_output("output: a", "E: no memory")
    with pytest.raises(BackendError, match="printed no text"):
        parse_output("a", figures)


def test_a_failure_of_the_app_is_reported() -> None:
    with pytest.raises(AdbError, match=r"^the app could not run it: the bundle takes 2490 MB"):
        read_report(b'{"error": "the bundle takes 2490 MB and 2000 MB are free"}')
    with pytest.raises(AdbError, match=r"not this version's .*: build and install android_demo again"):
        read_report(b'{"model": "nano"}')
