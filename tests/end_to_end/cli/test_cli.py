"""The command line as a user meets it: a process, its exit code, and what is on its two streams."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtp_export.arch.published import PAIRS
from mtp_export.source.embedded import EMBEDDED
from mtp_export.weights.recipes import RECIPES
from tests.conftest import Export, printed_by, run_cli, without_progress
from tests.support.places import ROOT
from tests.support.tiny_files import pair_arguments

SCRIPT = str(Path(sys.executable).parent / "mtp-export")
HEAVY = {"torch", "tensorflow", "transformers", "litert_torch", "litert_lm", "ai_edge_litert", "jax"}


def refused(*arguments: str) -> str:
    """Run a command that must end as the user's mistake; return its one line without the beginning."""
    return refusal_of(run_cli(*arguments, check=False))


def refusal_of(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """Check the exit code, that standard output is empty, and that there is one line of error; return that line."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = without_progress(done.stderr).strip().splitlines()  # a line break may close the ^C of a terminal
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mtp-export: error: ")
    return lines[0].removeprefix("mtp-export: error: ")


def packages_imported(arguments: list[str]) -> tuple[int, set[str]]:
    """Run a command; return its exit code and the packages that it imported."""
    command = [sys.executable, "-X", "importtime", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    return done.returncode, {name.partition(".")[0] for name in names}


class TestHelp:
    @pytest.mark.parametrize(
        "command",
        [
            *("--help", "--version", "xport"),
            *(f"{name} --help" for name in ("adapt", "calibrate", "cluster", "device parity", "export", "inspect")),
            *(f"{name} --help" for name in ("parity", "plan", "report", "run")),
        ],
    )
    def test_nothing_heavy_is_imported(self, command: str) -> None:
        """Not even when the command does not exist."""
        _, imported = packages_imported(command.split())
        assert "mtp_export" in imported
        assert not HEAVY & imported

    def test_without_a_command_there_is_help(self) -> None:
        done = run_cli()
        assert done.stdout == run_cli("--help").stdout
        assert all(name in done.stdout for name in ("export", "parity", "run"))

    def test_the_version_is_that_of_the_package(self) -> None:
        assert re.fullmatch(r"mtp-export, version \d+\.\d+\.\d+\n", run_cli("--version").stdout)


class TestMistakes:
    def test_options_alone_go_to_export(self, tmp_path: Path) -> None:
        """`mtp-export --model nano --target tflite` means `mtp-export export …`."""
        arguments = ("--model", "nano", "--target", "tflite", "--output", str(tmp_path))
        assert refused(*arguments) == refused("export", *arguments)
        assert refused(*arguments).startswith(f"{tmp_path} exists: ")

    def test_format_and_target_are_two_names_of_one_option(self, tmp_path: Path) -> None:
        output = ("--output", str(tmp_path))
        for arguments in (("--format", "onnx"), ("--format", "onnx", "--target", "onnx")):
            assert refused(*arguments, *output).startswith(f"{tmp_path} exists: ")
        for name in ("--target", "--format"):
            assert "--portable is for " in refused("--portable", name, "tflite", *output)

    def test_the_package_runs_as_a_module(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "mtp_export", "--output", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refusal_of(done).startswith(f"{tmp_path} exists: ")

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            (
                "--format onnx --target tflite",
                "--format (or --target, its older name) has the values onnx, tflite: give one",
            ),
            ("exprot", "No such command 'exprot'. Did you mean 'export'?"),
            ("--modle nano", "No such option '--modle'. Did you mean '--model'?"),
            ("export --outptu x", "No such option '--outptu'. Did you mean '--output'?"),
            ("parity --limt 3 x", "No such option '--limt'. Did you mean '--limit'?"),
            ("run x --num-draft-tokens all", "Invalid value for '--num-draft-tokens': 'all' is not a valid integer."),
            ("run", "Missing argument 'BUNDLE'. See 'mtp-export run --help'."),
            ("export nano", "Got unexpected extra argument (nano) See 'mtp-export export --help'."),
            ("--cache-length long", "Invalid value for '--cache-length': 'long' is not a valid integer."),
            ("--model e3b", f"--model is 'e3b', expected one of: {', '.join(sorted(PAIRS))}"),
            ("--target gguf", "--format is 'gguf', expected one of: onnx, tflite"),
            ("--portable", "--portable is for --format onnx, got --format tflite"),
            ("--batch-size 2", "--batch-size is for --format onnx, got --format tflite"),
            ("--target onnx --batch-size 9", "--batch-size is 9, expected 1 to 8"),
            ("--target onnx --batch-size 2 --portable", "--batch-size needs ONNX Runtime's own attention: leave"),
            ("--recipe q4", f"--recipe is 'q4', expected one of: {', '.join(sorted(RECIPES))}"),
            ("--drafter-recipe q4", f"--drafter-recipe is 'q4', expected one of: {', '.join(sorted(RECIPES))}"),
            ("--num-draft-tokens 0", "--num-draft-tokens is 0, expected 1 to 16"),
            ("--num-draft-tokens 17", "--num-draft-tokens is 17, expected 1 to 16"),
            ("--cache-length 31", "--cache-length is 31, expected 32 to"),
            ("--cache-length 4097", "--cache-length is 4097, expected 32 to 4096"),
            ("--drafter-position-offset 2", "--drafter-position-offset is 2, expected 0 to 1"),
            ("--workers 0", "--workers is 0, expected 1 to 64"),
        ],
    )
    def test_a_mistake_is_one_line(self, command: str, message: str, tmp_path: Path) -> None:
        place = [] if command.split()[0] in ("exprot", "parity", "run") else ["--output", str(tmp_path / "out")]
        assert refused(*command.split(), *place).startswith(message)
        assert list(tmp_path.iterdir()) == []

    def test_a_mistaken_option_is_reported_before_torch_is_loaded(self, tmp_path: Path) -> None:
        for arguments in (["--model", "e3b"], ["--output", str(tmp_path)]):
            code, imported = packages_imported(arguments)
            assert code == 2
            assert not HEAVY & imported

    def test_debug_shows_a_traceback(self, tmp_path: Path) -> None:
        done = run_cli("--debug", "--output", str(tmp_path), check=False)
        assert done.returncode == 2
        assert "Traceback" in done.stderr
        assert "exists" in done.stderr.splitlines()[-1]

    def test_a_very_long_name_is_cut(self, tmp_path: Path) -> None:
        assert len(refused("--model", "x" * 100_000, "--output", str(tmp_path / "out"))) < 1100

    def test_a_hub_id_that_is_not_cached_is_refused_at_once_when_offline(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        started = time.monotonic()
        message = refused("--model", "e2b", "--output", str(tmp_path / "out"))
        assert "google/gemma-4-E2B-it is neither a folder nor in the Hugging Face cache" in message
        assert time.monotonic() - started < 30, "no retries, no timeouts: what is slow is loading torch"
        assert not (tmp_path / "out").exists()

    def test_the_checkpoint_of_another_model_is_refused(self, tmp_path: Path) -> None:
        message = refused("--model", "e2b", "--checkpoint", str(EMBEDDED / "target"), "--output", str(tmp_path / "out"))
        assert "the target is nano, and --model is e2b: give --model nano" in message
        assert list(tmp_path.iterdir()) == []


class TestBadPlaces:
    @pytest.mark.parametrize(
        ("place", "reason"),
        [
            ("/proc/mtp/out", "no such file or directory"),
            ("/sys/out", "permission denied|operation not permitted|read-only file system"),
            ("{file}/out", "not a directory"),
            ("{file}/deeper/out", "not a directory"),
            ("{folder}/{long}", "file name too long"),
        ],
    )
    def test_a_place_where_nothing_can_be_written_is_refused(self, place: str, reason: str, tmp_path: Path) -> None:
        """Root may write past permission bits, but not here."""
        (tmp_path / "file").touch()
        output = place.format(file=tmp_path / "file", folder=tmp_path, long="x" * 300)
        message = refused("--output", output)
        assert re.fullmatch(rf"cannot write {re.escape(output)}: ({reason}): choose another --output", message)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_folder_without_write_permission_is_refused(self, tmp_path: Path) -> None:
        parent = tmp_path / "read-only"
        parent.mkdir(mode=0o555)
        command = [SCRIPT, "--output", str(parent / "out")]
        if os.geteuid() == 0:
            command = [*namespace("-U"), *command]  # in a user namespace that it is not mapped into, root is nobody
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refusal_of(done) == f"cannot write {parent / 'out'}: permission denied: choose another --output"

    def test_an_output_that_exists_needs_force(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert "exists: choose another --output, or replace it with --force" in refused(
            "--output", str(tmp_path / "out")
        )

    @pytest.mark.parametrize("kind", ["empty folder", "full folder", "another program's manifest", "file"])
    def test_force_replaces_nothing_but_bundles(self, kind: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        if kind == "file":
            out.write_text("mine")
        else:
            out.mkdir()
        if kind == "full folder":
            (out / "thesis.tex").write_text("mine")
        elif kind == "another program's manifest":
            (out / "manifest.json").write_text('{"name": "app", "manifest_version": 3, "version": "1.0"}')
        before = sorted(tmp_path.rglob("*"))
        assert "is not a bundle, so --force does not replace it" in refused("--force", "--output", str(out))
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_small_disk_is_refused_before_the_conversion(self, tmp_path: Path) -> None:
        """A tmpfs of 2 MB, in a mount namespace of its own."""
        script = f"mount -t tmpfs -o size=2m tmpfs {tmp_path} && {SCRIPT} --output {tmp_path}/a/out; "
        script += f"code=$?; ls -A {tmp_path}; exit $code"
        done = subprocess.run([*namespace("-Urm"), "sh", "-c", script], capture_output=True, text=True, check=False)
        message = refusal_of(done)
        assert re.search(r"has 0\.00 GB free and the bundle needs 0\.\d\d GB: free some space", message)


def namespace(flags: str) -> list[str]:
    """Return what starts a command in namespaces of its own; skips where the kernel forbids it."""
    command = ["unshare", flags]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode != 0:
        pytest.skip("this kernel does not let tests make user and mount namespaces")
    return command


def read_some(terminal: int) -> bytes:
    """Return what a terminal shows next; nothing once every process has closed it."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


class TestOutput:
    def test_an_export_prints_json_alone(self, export_nano: Export) -> None:
        bundle = export_nano("int8")
        stdout, stderr = json.loads(printed_by(bundle).read_text())
        result = json.loads(stdout)
        assert stdout.count("\n") == 1
        assert stderr == ""
        assert result["output"] == str(bundle)
        assert result["files_bytes"]["target.tflite"] == (bundle / "target.tflite").stat().st_size
        assert not [path for path in bundle.parent.iterdir() if path.name.startswith(".")]

    def test_a_run_prints_json_alone_too(self, export_nano: Export) -> None:
        done = run_cli("run", str(export_nano("int8")), "def", "--max-new-tokens", "4", "--json")
        assert len(json.loads(done.stdout)["tokens"]) == 4
        assert done.stderr == ""

    def test_a_run_with_an_adaptive_k_gives_the_same_tokens(self, export_nano: Export) -> None:
        command = ("run", str(export_nano("int8")), "def", "--max-new-tokens", "40", "--json", "--num-draft-tokens")
        fixed, adapted = (json.loads(run_cli(*command, k).stdout) for k in ("4", "auto"))
        assert adapted["tokens"] == fixed["tokens"]
        assert adapted["stats"]["decode_steps"] > fixed["stats"]["decode_steps"], "it compares with plain decoding"

    @pytest.mark.parametrize("arguments", [["--help"], ["run", "{bundle}", "def", "--max-new-tokens", "40"]])
    def test_a_reader_that_leaves_causes_no_message(self, arguments: list[str], export_nano: Export) -> None:
        """As `| head -1`, but gone before the first byte, so that the pipe is closed for certain."""
        reader, writer = os.pipe()
        os.close(reader)
        command = [SCRIPT, *(a.format(bundle=export_nano("int8")) for a in arguments)]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert done.returncode == 1
        assert done.stderr == ""

    def test_output_can_be_piped_into_head(self, export_nano: Export) -> None:
        script = f"{SCRIPT} run {export_nano('int8')} def --json --max-new-tokens 40 | head -n 1"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) == 1
        assert done.stderr == ""

    def test_a_terminal_shows_tensors_bytes_and_time_left(self, export_nano: Export, tmp_path: Path) -> None:
        export_nano("int8")  # its segments are kept
        terminal, screen = pty.openpty()
        command = [SCRIPT, "export", "--output", str(tmp_path / "out")]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=screen):
            os.close(screen)
            shown = b""
            while chunk := read_some(terminal):
                shown += chunk
        os.close(terminal)
        line = re.compile(
            r"writing weights \S+ +\d+% \d+ tensors 0\.0\d/0\.0\d GB \d:\d\d:\d\d [-\d]:[-\d]{2}:[-\d]{2}"
        )
        lines = [text.strip() for text in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode()).splitlines()]
        assert any(line.fullmatch(text) for text in lines), lines
        assert "mtp-export: working: " not in shown.decode(), "lines are for what is no terminal"
        assert max(len(text) for text in lines if "━" in text) <= 80

    def test_a_full_output_is_reported(self) -> None:
        with open("/dev/full", "w") as full:
            done = subprocess.run([SCRIPT, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == "mtp-export: error: no space left to write to: free some space\n"

    @pytest.mark.usefixtures("no_segments")
    def test_a_disk_that_fills_up_during_the_export_is_reported(self, tiny_source: Path, tmp_path: Path) -> None:
        """A tmpfs with room enough to begin; something else fills it while the graphs are being converted."""
        disk = tmp_path / "disk"
        disk.mkdir()
        script = f"""
            mount -t tmpfs -o size=80m tmpfs {disk} || exit 99
            {sys.executable} -m tests.support.tiny_files {tiny_source} "$@" --output {disk}/out &
            export=$!
            until pgrep -P $export -f spawn_main >/dev/null || ! kill -0 $export; do sleep 0.1; done
            dd if=/dev/zero of={disk}/other bs=1M 2>/dev/null
            wait $export; code=$?
            ls -A {disk} | grep -v other
            exit $code"""
        prefix = (*namespace("-Urm"), "sh", "-c", script, "sh")
        command = [*prefix, *pair_arguments(tiny_source), "--recipe", "f32"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert refusal_of(done) == f"the disk of {disk} is full: free some space, nothing was written"
