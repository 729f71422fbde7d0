"""Running a request: in a process of its own on this machine, or with the Python of a device behind adb."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from mtp_export.device.adb import FOLDER, Adb
from mtp_export.device.protocol import Answer, Request
from mtp_export.device.transfer import Sent, code_archive, send
from mtp_runtime.bundle import sha256_of
from mtp_runtime.errors import BackendError, UserError

_MODULE = "mtp_export.device.on_device"


def run_here(request: Request) -> Answer:
    """Run `request` on this machine.

    Raises:
        MtpError: it fails.
    """
    with tempfile.TemporaryDirectory(prefix="mtp-device-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_bytes(msgspec.json.encode(request))
        command = [sys.executable, "-m", _MODULE, str(asked), str(answered)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise UserError(said[-1]) if done.returncode == 2 else BackendError(f"on this machine: {said[-1]}")
        return msgspec.json.decode(answered.read_bytes(), type=Answer)


def run_with_python(adb: Adb, request: Request, on_line: Callable[[str], None] = lambda line: None) -> Answer:
    """Run `request`, whose paths are the device's, with the Python that is there.

    Raises:
        AdbError: there is no Python, the run failed or was killed, or the device went away.
    """
    with tempfile.TemporaryDirectory(prefix="mtp-device-") as folder:
        code = code_archive(Path(folder))
        home = send(adb, [code], f"{FOLDER}/code/{code.sha256[:16]}").folder
        asked = Path(folder) / "request.json"
        asked.write_bytes(msgspec.json.encode(request))
        request_there = send(adb, [Sent(asked, sha256_of(asked), asked.stat().st_size)], _runs(asked)).folder
        answer_there = f"{request_there}/answer.json"
        adb.shell(
            f"cd {request_there} && rm -f answer.json && "
            f"PYTHONPATH={home}/{code.path.name}:$PYTHONPATH python3 -m {_MODULE} request.json answer.json",
            on_line=on_line,
        )
        answered = Path(folder) / "answer.json"
        adb.pull(answer_there, answered)
        return msgspec.json.decode(answered.read_bytes(), type=Answer)


def _runs(request: Path) -> str:
    return f"{FOLDER}/runs/{sha256_of(request)[:16]}"


def check_emulated(adb: Adb) -> None:
    """Check that the device is the emulated place, which says so itself in its environment.

    Raises:
        UserError: it is another device.
    """
    if adb.shell("echo $MTP_PLACE").strip() != "arm64-emulated":
        raise UserError(
            f"{adb.serial} is not the emulated ARM64 place, and has no Python with the runtimes to run the prompts: "
            "start the place with `python -m tools.arm64_device start`, and name it with --serial (docs/device.md)"
        )
