"""The report of a real bundle, opened in a real browser where there is one (Debian's chromium)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Export, run_cli


@pytest.fixture(scope="module")
def folder(export_nano: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a bundle, written elsewhere, on two prompts one of which is full of markup."""
    output = tmp_path_factory.mktemp("report")
    prompts = output / "prompts.jsonl"
    lines = [
        {"kind": "<b>bold</b>", "text": "<script>document.title = 'x'</script>"},
        {"kind": "code", "text": "def f("},
    ]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    bundle, bench = str(export_nano("int8")), output / "bench.json"
    bench.write_text(run_cli("bench", bundle, "--repeats", "3", "--new-tokens", "8", "--json").stdout)
    options = ("--limit", "2", "--device", "A & B", "--bench", str(bench), "--output", str(output))
    run_cli("report", bundle, "--prompts", str(prompts), *options)
    return output


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)|https?://|url\(|@import", page)
    assert "&lt;script&gt;document.title" in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "A &amp; B" in page
    report = json.loads((folder / "report.json").read_text())
    assert [(row["kind"], row["num_draft_tokens"]) for row in report["rows"]][4:] == [("code", k) for k in (1, 2, 3, 4)]
    bench = json.loads((folder / "bench.json").read_text())
    here, there = report["devices"]
    assert (here["name"], there["name"]) == ("A & B", bench["machine"])
    assert there["costs"]["decode_ms"] == bench["passes"]["decode"]["median_ms"]
    assert there["break_even"] == bench["break_even"]
    assert all(device["advice"].startswith("drafts pay for") for device in report["devices"])
    for row in report["rows"]:
        assert len(row["accepted_at"]) == row["num_draft_tokens"]
        assert row["accepted_at"] == sorted(row["accepted_at"], reverse=True)
    for example in report["examples"]:
        assert len(example["pieces"]) == len(example["origins"]) == 64
        assert "accepted" in example["origins"]


def test_a_report_reads_what_device_bench_writes(export_nano: Export, tmp_path: Path) -> None:
    """The way of README: time a bundle there, then report on it here."""
    bundle, bench = str(export_nano("int8")), tmp_path / "phone.json"
    options = ("--where", "host", "--limit", "2", "--repetitions", "1", "--max-new-tokens", "16", "--threads", "1")
    bench.write_text(run_cli("device", "bench", bundle, *options, "--output", str(tmp_path), "--json").stdout)
    reporting = ("--limit", "2", "--max-new-tokens", "16", "--output", str(tmp_path), "--json")
    report = json.loads(run_cli("report", bundle, "--bench", str(bench), *reporting).stdout)
    there, profile = report["devices"][1], json.loads(bench.read_text())
    assert (there["name"], list(there["costs"]["rounds_ms"])) == (profile["machine"], ["4"])
    assert there["costs"]["decode_ms"] == profile["passes"]["decode"]["median_ms"]
    assert {expected["num_draft_tokens"] for expected in there["expected"]} == {4}
    assert "round, K = 4" in (tmp_path / "report.html").read_text()

    withheld = bench.with_name("emulated.json")
    withheld.write_text(json.dumps({**profile, "passes": {}, "rounds": [], "break_even": {}}))
    done = run_cli("report", bundle, "--bench", str(withheld), *reporting, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "emulated.json has no times, as of an emulated place" in done.stderr


def test_a_browser_shows_it(folder: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    # Without a network; whoever runs this may be root.
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    options = ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000"]
    page = f"file://{folder / 'report.html'}"
    done = subprocess.run([*command, *options, page], capture_output=True, text=True, timeout=60, check=True)
    assert "<title>nano, int8, tflite</title>" in done.stdout
    assert len(re.findall(r'<span class="accepted">', done.stdout)) > 10
    assert done.stdout.count("<polyline") >= 6
    assert "Uncaught" not in done.stderr
