"""nano on two emulated ARM64 CPUs, through the real adb: its output there is its output here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mtp_export.device.adb import adb_program
from tests.conftest import Export, run_cli
from tests.device.conftest import OpenPlace
from tests.end_to_end.golden.files import MAX_NEW_TOKENS, PROMPTS, read_traces

pytestmark = pytest.mark.arm64

RUNS = [  # those of one CPU together, in the order of CPUS
    ("cortex-a53", "int8", "tflite"),
    ("cortex-a53", "int4", "tflite"),
    ("cortex-a53", "int8", "onnx"),
    ("cortex-a76", "int8", "tflite"),
    ("cortex-a76", "int4", "tflite"),
]
CPUS = ("cortex-a53", "cortex-a76")
# LiteRT-LM 0.18.1 is compiled for CPUs with LSE atomics, and ends with an illegal instruction on one without.
WITHOUT_LSE = ("cortex-a53",)
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def runs(
    export_nano: Export, open_place: OpenPlace, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str], Done]:
    """Every run, those of one CPU after another and the two CPUs at once."""
    sockets = {cpu: open_place(cpu).socket for cpu in CPUS}
    bundles = {run: export_nano(run[1], export_format=run[2]) for run in RUNS}
    output = tmp_path_factory.mktemp("reports")

    def parity(run: tuple[str, str, str]) -> Done:
        command = [str(Path(sys.executable).parent / "mtp-export"), "device", "parity", str(bundles[run]), "--json"]
        command += ["--where", "arm64-emulated", "--prompts", str(PROMPTS), "--threads", "1"]
        command += ["--max-new-tokens", str(MAX_NEW_TOKENS), "--output", str(output / "-".join(run))]
        command += ["--no-stock"] if run[0] in WITHOUT_LSE else []
        environ = {**os.environ, "ADB_SERVER_SOCKET": sockets[run[0]]}
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(len(CPUS)) as pool:
        done = pool.map(lambda cpu: [parity(run) for run in RUNS if run[0] == cpu], CPUS)
        return dict(zip(RUNS, [result for results in done for result in results], strict=True))


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_the_emulated_device_generates_the_same(
    runs: dict[tuple[str, str, str], Done], run: tuple[str, str, str]
) -> None:
    done = runs[run]
    assert done.returncode == 0, done.stderr + done.stdout
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["outcome"] == "passed"
    place = report["place"]
    assert (place["where"], place["machine"], place["cpu"]) == ("arm64-emulated", "aarch64", run[0])
    assert place["emulator"].startswith("qemu-aarch64")
    assert report["host"]["where"] == "host"
    expected = [("itself without MTP", "mtp_runtime", 4), ("this machine, fed the same text", "mtp_runtime", 0)]
    if run[2] == "tflite" and run[0] not in WITHOUT_LSE:
        expected += [("mtp_runtime without MTP", "LiteRT-LM", 0), ("itself without MTP", "LiteRT-LM", 4)]
    checks = report["checks"]
    runners = [(c["reference"], c["result"]["runner"], c["result"]["num_draft_tokens"]) for c in checks]
    assert runners == expected
    golden = [trace for trace in read_traces() if trace.recipe == run[1]]
    lengths = [len(trace.tokens) for trace in golden if not trace.num_draft_tokens]
    for check in checks:
        result = check["result"]
        assert result["tokens_per_second"] is None, "an emulated CPU's speed is in the report"
        assert [c["compared"] for c in result["comparisons"]] == lengths
        # The golden prompts' two best logits are never closer than 0.2: no near-tie is to be expected.
        assert [c["verdict"] for c in result["comparisons"]] == ["equal"] * len(lengths)
        if result["num_draft_tokens"]:
            assert result["committed_per_round"] > 1.5, "MTP runs there, but its drafts are not accepted"
    distances = checks[1]["distances"]
    assert distances["positions"] == sum(lengths)
    assert distances["median"] < checks[1]["tolerance"] / 2
    if run[2] == "tflite":
        by_prompt = zip(*(depth["traces"] for depth in report["traces"]), strict=True)
        assert [trace.tokens for trace in golden] == [
            tuple(trace["tokens"]) for depths in by_prompt for trace in depths
        ]


def test_a_device_of_another_kind_is_refused(
    open_place: OpenPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real device that does not name itself the emulated place: that name is taken out of adb's output."""
    adb = tmp_path / "adb"
    adb.write_text(f'#!/bin/sh\n{adb_program()} "$@" | sed s/arm64-emulated//\n', encoding="utf-8")
    adb.chmod(0o755)
    monkeypatch.setenv("ADB_SERVER_SOCKET", open_place(CPUS[-1]).socket)
    monkeypatch.setenv("ADB", str(adb))
    done = run_cli("device", "parity", str(tmp_path), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mtp-export: error: 127.0.0.1:5601 is not the emulated ARM64 place")
    assert len(done.stderr.splitlines()) == 1
