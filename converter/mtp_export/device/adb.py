"""adb, called as a program: one device by its serial, and every failure as one line with its remedy."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from mtp_runtime.atomic import replacing
from mtp_runtime.errors import UserError

_END = "mtp-exit:"  # comes before a shell command's own exit code: adb's is 1 for a cut connection too
_KILLED = 137  # 128 + SIGKILL, which is how Android ends programs when memory runs low
_NOT_FOUND = 127
_LOST = "the connection to {serial} was lost: plug it in again and run the same command, which goes on where it was cut"

# adb's complaint (on standard error) → what it means and what to do. The first that fits is taken.
_COMPLAINTS = (
    (r"unauthorized|failed to authenticate", "unlock the device and accept 'Allow USB debugging', then run it again"),
    (r"device offline", "it answers no more: unplug it, plug it in again (or `adb reconnect offline`)"),
    (r"more than one device", "several devices are connected: name one with --serial"),
    (r"No space left on device", "its disk is full: free space there (old bundles are in {folder}) and run it again"),
    (r"Permission denied|Operation not permitted", "the device does not let adb do this: choose a folder that it may"),
    (r"Read-only file system", "that folder is read-only: choose one under /data/local/tmp"),
    (r"cannot connect to daemon|failed to start daemon", "adb's server does not start: try `adb kill-server`"),
)
FOLDER = "/data/local/tmp/mtp-export"


class AdbError(UserError):
    """adb, or the device behind it, failed at a command."""


class Listed(NamedTuple):
    """A line of `adb devices -l`."""

    serial: str
    state: str
    details: str


class Ended(NamedTuple):
    """How a shell command on the device ended. A code of None: the connection was lost before it did."""

    code: int | None
    output: str
    errors: str


def adb_program() -> str:
    """Return the adb to call: `$ADB`, the one on PATH, or the one that the package adbutils carries.

    Raises:
        AdbError: there is none.
    """
    named = os.environ.get("ADB")
    if named:
        if shutil.which(named) is None:
            raise AdbError(f"ADB is {named!r}, which is no program: name the adb of Android's platform tools")
        return named
    on_path = shutil.which("adb")
    if on_path:
        return on_path
    package = importlib.util.find_spec("adbutils")
    bundled = Path(package.origin).parent / "binaries" / "adb" if package and package.origin else None
    if bundled and bundled.exists():
        return str(bundled)
    raise AdbError("no adb: pip install 'mtp-export[device]', or set ADB to the adb of Android's platform tools")


def devices(program: str) -> list[Listed]:
    """Return every device that adb's server knows, in whatever state."""
    done = subprocess.run([program, "devices", "-l"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise AdbError(_explained(done.stderr, "adb"))
    lines = [line.split(None, 1) for line in done.stdout.splitlines() if line.strip() and "List of devices" not in line]
    listed = []
    for serial, rest in (line for line in lines if len(line) == 2):
        state = "no permissions" if rest.startswith("no permissions") else rest.split()[0]
        listed.append(Listed(serial, state, rest[len(state) :].strip()))
    return listed


class Adb:
    """One device. Every call names its serial, so that a second one plugged in later changes nothing."""

    def __init__(self, program: str, serial: str, *, silence_s: float = 600.0) -> None:
        """Take a device that is ready; `open` finds it. A call that shows no sign of life for `silence_s` is ended."""
        self.serial = serial
        self._program = program
        self._silence_s = silence_s

    @classmethod
    def open(cls, serial: str | None = None, *, silence_s: float = 600.0) -> Adb:
        """Return the device `serial`, or the only one.

        Raises:
            AdbError: there is none, there are several, or it is not ready; with what to do about it.
        """
        program = adb_program()
        listed = devices(program)
        if serial is not None:
            chosen = [device for device in listed if device.serial == serial]
            if not chosen:
                seen = ", ".join(f"{device.serial} ({device.state})" for device in listed) or "none"
                raise AdbError(f"no device {serial}: adb sees {seen}")
        else:
            chosen = listed
        if not chosen:
            raise AdbError("no device: start the emulated one (`python -m tools.arm64_device start`, docs/device.md)")
        if len(chosen) > 1:
            names = ", ".join(f"{device.serial} ({device.state})" for device in chosen)
            raise AdbError(f"several devices are connected: {names}: name one with --serial")
        device = chosen[0]
        if device.state != "device":
            raise AdbError(f"{device.serial} is {device.state}: {_REMEDIES.get(device.state, _REMEDIES['offline'])}")
        return cls(program, device.serial, silence_s=silence_s)

    def try_shell(
        self, command: str, *, stdin: Iterable[bytes] = (), on_line: Callable[[str], None] | None = None
    ) -> Ended:
        """Run `command` in the device's shell, feeding it `stdin`; `on_line` gets its lines of output as they come.

        Raises:
            AdbError: it shows no sign of life for too long.
        """
        call = [self._program, "-s", self.serial, "shell", "-T", f"({command}); echo {_END}$?"]
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            watchdog = _Watchdog(process, self._silence_s)
            try:
                lines, code = _talk(process, stdin, on_line, watchdog.alive)
            finally:
                process.kill()
                process.wait()
                watchdog.stop()
            if watchdog.barked:
                raise AdbError(
                    f"{self.serial} has shown no sign of life for {self._silence_s:g} s: see if it is locked up, or "
                    "allow more with --timeout"
                )
            errors.seek(0)
            return Ended(code, "\n".join(lines), errors.read().decode("utf-8", errors="replace"))

    def shell(self, command: str, *, stdin: Iterable[bytes] = (), on_line: Callable[[str], None] | None = None) -> str:
        """Run `command` as `run` does and return its output."""
        return self.run(command, stdin=stdin, on_line=on_line).output

    def run(self, command: str, *, stdin: Iterable[bytes] = (), on_line: Callable[[str], None] | None = None) -> Ended:
        """Run `command` as `try_shell` does, which must end well.

        Raises:
            AdbError: it failed, was killed, does not exist, or the device went away.
        """
        ended = self.try_shell(command, stdin=stdin, on_line=on_line)
        if ended.code == 0:
            return ended
        name = command.split()[-1] if len(command.split()) == 1 else _program_of(command)
        if ended.code is None:
            raise AdbError(_explained(ended.errors, self.serial, lost=True))
        if ended.code == _KILLED:
            raise AdbError(
                f"{name} was killed on {self.serial}, as Android does when memory runs low: close other apps, or take "
                "a smaller recipe, model or --cache-length"
            )
        if ended.code == _NOT_FOUND:
            raise AdbError(f"{self.serial} has no program {name}: {_last_line(ended.errors)}")
        raise AdbError(_explained(ended.errors or ended.output, self.serial, code=ended.code, name=name))

    def pull(self, path: str, to: Path) -> None:
        """Copy a file of the device to `to`, written beside it and renamed.

        Raises:
            AdbError: it is not there, or the device went away.
        """
        with replacing(to) as beside:
            call = [self._program, "-s", self.serial, "pull", path, str(beside)]
            try:
                done = subprocess.run(call, capture_output=True, text=True, timeout=self._silence_s, check=False)
            except subprocess.TimeoutExpired:
                raise AdbError(f"{self.serial} sent nothing for {self._silence_s:g} s: run it again") from None
            if done.returncode != 0:
                raise AdbError(_explained(done.stderr or done.stdout, self.serial))


_REMEDIES = {
    "unauthorized": "unlock it and accept 'Allow USB debugging', then run it again",
    "authorizing": "unlock it and accept 'Allow USB debugging', then run it again",
    "offline": "it does not answer: unplug it, plug it in again (or `adb reconnect offline`)",
    "connecting": "it does not answer yet: wait, or unplug it and plug it in again",
    "no permissions": "this user may not open the USB device: install Android's udev rules (package "
    "android-sdk-platform-tools-common) and plug it in again",
}


class _Watchdog:
    """Kills a process that shows no sign of life for too long."""

    def __init__(self, process: subprocess.Popen[bytes], silence_s: float) -> None:
        self.barked = False
        self._process = process
        self._silence_s = silence_s
        self._last = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def alive(self) -> None:
        self._last = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(min(0.2, self._silence_s)):
            if time.monotonic() - self._last > self._silence_s:
                self.barked = True
                self._process.kill()
                return


def _talk(
    process: subprocess.Popen[bytes],
    stdin: Iterable[bytes],
    on_line: Callable[[str], None] | None,
    alive: Callable[[], None],
) -> tuple[list[str], int | None]:
    """Feed a shell call and read it to its end; returns its lines of output and its exit code, None without one."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for piece in stdin:
            process.stdin.write(piece)
            alive()
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended before it had read all: its exit code and its output tell why
    lines: list[str] = []
    for raw in process.stdout:
        alive()
        line = raw.decode("utf-8", errors="replace").rstrip("\r\n")
        before, end, code = line.rpartition(_END)
        if end and code.isdigit():
            return ([*lines, before] if before else lines), int(code)
        lines.append(line)
        if on_line:
            on_line(line)
    return lines, None


def _program_of(command: str) -> str:
    """Return the program that a shell command runs: its first word that is no `cd`, assignment or separator."""
    simple = re.split(r"&&|;", command)[-1]
    words = [word for word in simple.split() if "=" not in word]
    return words[0] if words else command


def _explained(complaint: str, serial: str, *, lost: bool = False, code: int | None = None, name: str = "") -> str:
    for pattern, remedy in _COMPLAINTS:
        if re.search(pattern, complaint):
            return f"{serial}: {_last_line(complaint)}: {remedy.format(folder=FOLDER)}"
    if lost or re.search(r"device '.*' not found|no devices|closed|EOF|reset by peer|protocol fault", complaint):
        return _LOST.format(serial=serial)
    failed = f"{name} ended with {code}: " if code is not None else ""
    return f"{serial}: {failed}{_last_line(complaint)}"


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1].removeprefix("adb: ").removeprefix("error: ") if lines else "it printed nothing"
