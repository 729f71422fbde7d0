"""An export that is interrupted or killed, or whose worker dies: no half-written bundle, no process left."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.cli.test_cli import SCRIPT, refusal_of

TIMEOUT_S = 120.0


@dataclasses.dataclass(frozen=True)
class Started:
    """An export that is running, by default until its conversion has begun."""

    process: subprocess.Popen[str]
    folder: Path

    def workers(self) -> set[int]:
        """Conversion processes that are running now."""
        return {pid for pid in children_of(self.process.pid) if "spawn_main" in command_of(pid)}

    def wait_for_workers(self) -> set[int]:
        wait_until(lambda: bool(self.workers()) or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()
        return self.workers()

    def ended(self) -> subprocess.CompletedProcess[str]:
        stdout, stderr = self.process.communicate(timeout=TIMEOUT_S)
        return subprocess.CompletedProcess([], self.process.returncode, stdout, stderr)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def children_of(pid: int) -> set[int]:
    children: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children |= {int(child) for child in file.read_text().split()}
        except OSError:
            continue  # the thread has ended
    return children


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Started]]:
    """Return a function that starts an export of nano into `tmp_path`/out, in a process group of its own."""
    started: list[subprocess.Popen[str]] = []

    def start_one() -> Started:
        process = subprocess.Popen(
            [SCRIPT, "--output", str(tmp_path / "out"), "--workers", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return Started(process, tmp_path)

    yield start_one
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.communicate()


@pytest.mark.usefixtures("hears_ctrl_c", "no_segments")
class TestInterruption:
    @pytest.mark.parametrize(
        ("delay_s", "presses"), [(0.0, 1), (3.0, 1), (3.0, 3)], ids=["workers start", "converting", "pressed thrice"]
    )
    def test_ctrl_c_leaves_nothing(self, start: Callable[[], Started], delay_s: float, presses: int) -> None:
        """A terminal sends Ctrl-C to the whole process group: workers must not print errors of their own.

        Nothing here is a terminal, so a conversion of three seconds has its line of progress, before the error.
        """
        export = start()
        workers = export.wait_for_workers()
        time.sleep(delay_s)
        workers |= export.workers()
        for _ in range(presses):
            os.killpg(export.process.pid, signal.SIGINT)
            time.sleep(0.05)
        pressed = time.monotonic()
        done = export.ended()
        assert time.monotonic() - pressed < 15, "it waited for conversions that are of no use any more"
        assert refusal_of(done, 130) == "interrupted; nothing half-written is left"
        lines = done.stderr.strip().splitlines()
        assert not delay_s or [line for line in lines if line.startswith("mtp-export: working: converting graphs")]
        assert not lines[-1].startswith("mtp-export: working: ")
        assert export.names() == []
        assert not any(is_alive(pid) for pid in workers)

    def test_a_killed_export_leaves_no_bundle_and_the_next_cleans_up(self, start: Callable[[], Started]) -> None:
        killed = start()
        workers = killed.wait_for_workers()
        (leftover,) = killed.names()
        killed.process.kill()
        killed.ended()
        assert leftover.startswith(".out.partial-")
        assert killed.names() == [leftover]
        wait_until(lambda: not any(is_alive(pid) for pid in workers), 30)

        second = start()
        workers = second.wait_for_workers()
        (own,) = second.names()
        assert own != leftover
        second.process.send_signal(signal.SIGTERM)
        done = second.ended()
        assert refusal_of(done, 130) == "interrupted; nothing half-written is left"
        assert second.names() == []
        assert not any(is_alive(pid) for pid in workers)

    def test_a_worker_that_dies_is_our_failure(self, start: Callable[[], Started]) -> None:
        """As the kernel does when memory runs out."""
        export = start()
        os.kill(min(export.wait_for_workers()), signal.SIGKILL)
        message = refusal_of(export.ended(), 1)
        assert message.startswith("a conversion process died, most likely for want of memory")
        assert export.names() == []
