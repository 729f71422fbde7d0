"""Bundles that several tests look at, each exported once by the real command."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest

from tools.fetched.cache import cache_folder

# On a busy machine any example may take long; what takes too long is seen in the durations.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

Export = Callable[..., Path]

TESTS = Path(__file__).parent

# Folders and modules that export, train, convert many segments, or start other programs for most of their tests. Tests
# with a bundle of nano are slow wherever they are.
SLOW = (
    "device",
    "differential",
    "end_to_end/calibration",
    "end_to_end/cli",
    "end_to_end/examples",
    "end_to_end/formats/test_cache_graphs.py",
    "end_to_end/formats/test_passes.py",
    "end_to_end/formats/test_random_chains.py",
    "end_to_end/formats/test_segment_cache.py",
    "end_to_end/golden",
    "end_to_end/nano",
    "end_to_end/test_real_size.py",
    "stock",
)
QUICK = ("differential/test_models.py", "differential/test_page.py", "end_to_end/cli/test_fuzz.py")
LONG = {"full_size"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as slow, and as long, by where they are and what they need."""

    def lies_in(item: pytest.Item, places: tuple[str, ...]) -> bool:
        return any(item.path.is_relative_to(TESTS / place) for place in places)

    for item in items:
        with_bundle = "export_nano" in getattr(item, "fixturenames", ())
        if with_bundle or (lies_in(item, SLOW) and not lies_in(item, QUICK)):
            item.add_marker(pytest.mark.slow)
        if LONG & {marker.name for marker in item.iter_markers()}:
            item.add_marker(pytest.mark.long)


def printed_by(bundle: Path) -> Path:
    """Where the export of a bundle left what it printed, to stdout and to stderr."""
    return bundle.with_name("printed.json")


# Of torch, here and in every command: nano's operations are so small that a second thread mostly waits for the first,
# and with all processors busy each of them waits for milliseconds.
os.environ["OMP_NUM_THREADS"] = "1"


def run_cli(
    *arguments: str, check: bool = True, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `mtp-export` as a user does, with some variables of the environment changed; leave out lines of progress."""
    command = [str(Path(sys.executable).parent / "mtp-export"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    done.stderr = without_progress(done.stderr)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return done


def without_progress(stderr: str) -> str:
    """Return standard error without the lines of progress, which depend on how fast the machine is."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith("mtp-export: working: "))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this run that all its processes see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def segments_of_this_run(run_folder: Path) -> Iterator[None]:
    """Exports share converted segments with each other, and not with what other runs of the tests left. What was
    downloaded stays where it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTP_CACHE", str(cache_folder()))
        patch.setenv("XDG_CACHE_HOME", str(run_folder / "cache"))
        yield


@pytest.fixture
def no_segments(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports find no converted segment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def export_nano(tmp_path_factory: pytest.TempPathFactory, run_folder: Path) -> Export:
    """Export nano with a recipe, once for all tests; `fresh` converts and exports it again, elsewhere. `export_format`
    is `tflite`, `tflite-rings` for rings of 512, `tflite-whole` for none, `tflite-2000` for another longest context,
    `tflite-gpu` for `--delegate gpu`, `tflite-composites` for that with `--composites`, `onnx` (with graphs for eight
    sequences too), or `onnx-portable` for ONNX in standard operations. What it printed lies beside it."""

    def export(recipe: str, *, export_format: str = "tflite", fresh: bool = False) -> Path:
        folder = run_folder / (f"{export_format}-{recipe}-again" if fresh else f"{export_format}-{recipe}")
        folder.mkdir(exist_ok=True)
        output = folder / folder.name
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed: another process may want the same bundle
            if output.exists():
                return output
            name = export_format.partition("-")[0]
            arguments = ("--model", "nano", "--target", name, "--recipe", recipe, "--output", str(output))
            variants = {
                "onnx": ("--batch-size", "8"),
                "onnx-portable": ("--portable",),
                "tflite-rings": ("--rings", "512"),
                "tflite-whole": ("--rings", "off"),
                "tflite-2000": ("--cache-length", "2000"),
                "tflite-gpu": ("--delegate", "gpu"),
                "tflite-composites": ("--delegate", "gpu", "--composites"),
            }
            environment = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))} if fresh else {}
            done = run_cli(*arguments, "--json", *variants.get(export_format, ()), environment=environment)
            printed_by(output).write_text(json.dumps([done.stdout, done.stderr]))
        return output

    return export


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pair as transformers saves it, in `target` and `drafter`. Do not change it."""
    from tests.support import tiny_files

    folder = tmp_path_factory.mktemp("tiny")
    tiny_files.save_pair(folder)
    return folder


@pytest.fixture
def tiny(tiny_source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pair to spoil."""
    from tests.support import tiny_files

    return tiny_files.copy_pair(tiny_source, tmp_path / "tiny")


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """Hear Ctrl-C, and let children hear it, even where a shell in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many transformations of checkpoints were exported to the same model, how many were refused, and how many
    conversations LiteRT-LM renders as transformers does."""
    properties = [pair for report in terminalreporter.stats.get("passed", ()) for pair in report.user_properties]
    kinds = [value for name, value in properties if name == "transformation"]
    if kinds:
        equal, refused = kinds.count("equal"), kinds.count("refused")
        terminalreporter.write_line(f"transformations of checkpoints: {equal} equal to transformers, {refused} refused")
    counts = [value for name, value in properties if name == "conversations"]
    if counts:
        terminalreporter.write_line(
            f"chat templates in LiteRT-LM: {len(counts)} templates, {sum(counts)} conversations equal"
        )
