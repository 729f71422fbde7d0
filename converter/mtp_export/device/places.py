"""Running a request, in a process of its own on this machine, or with the Python of a device behind adb."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from mtp_export.device.adb import FOLDER, Adb
from mtp_export.device.protocol import Answer, PlaceDescription, Request, Where
from mtp_export.device.transfer import Sent, code_archive, send
from mtp_export.machine import cpu_name
from mtp_runtime.bundle.bundle import sha256_of
from mtp_runtime.errors import BackendError, UserError

MODULE = "mtp_export.device.on_device"


def run_here(request: Request) -> Answer:
    """Run `request` on this machine.

    Raises:
        MtpError: it fails.
    """
    with tempfile.TemporaryDirectory(prefix="mtp-device-") as folder:
        request_path, answer_path = Path(folder) / "request.json", Path(folder) / "answer.json"
        request_path.write_bytes(msgspec.json.encode(request))
        command = [sys.executable, "-m", MODULE, str(request_path), str(answer_path)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise UserError(lines[-1]) if done.returncode == 2 else BackendError(f"on this machine: {lines[-1]}")
        return msgspec.json.decode(answer_path.read_bytes(), type=Answer)


def run_with_python(adb: Adb, request: Request, on_line: Callable[[str], None] = lambda line: None) -> Answer:
    """Run `request`, whose paths are the device's, with the Python that is there.

    Raises:
        AdbError: there is no Python, the run failed or was killed, or the device went away.
    """
    with tempfile.TemporaryDirectory(prefix="mtp-device-") as folder:
        code = code_archive(Path(folder), MODULE)
        home = send(adb, [code], f"{FOLDER}/code/{code.sha256[:16]}").folder
        request_path, answer_path = Path(folder) / "request.json", Path(folder) / "answer.json"
        request_path.write_bytes(msgspec.json.encode(request))
        request_there = send(adb, [Sent.of(request_path)], _runs(request_path)).folder
        answer_there = f"{request_there}/answer.json"
        adb.shell(
            f"cd {request_there} && rm -f answer.json && "
            f"PYTHONPATH={home}/{code.path.name}:$PYTHONPATH python3 -m {MODULE} request.json answer.json",
            on_line=on_line,
        )
        adb.pull(answer_there, answer_path)
        return msgspec.json.decode(answer_path.read_bytes(), type=Answer)


def _runs(request: Path) -> str:
    return f"{FOLDER}/runs/{sha256_of(request)[:16]}"


def describe(adb: Adb) -> PlaceDescription:
    """Describe a device by what it reports of itself.

    Raises:
        UserError: it is neither the emulated place nor an Android phone.
    """
    where, emulator, machine = adb.shell('echo "$MTP_PLACE"; echo "$MTP_EMULATOR"; uname -m').splitlines()
    if where == "arm64-emulated":
        return PlaceDescription(
            where="arm64-emulated",
            machine=machine,
            cpu=cpu_name(adb.shell("cat /proc/cpuinfo")),
            system="Debian root behind adbd",
            emulator=emulator,
            versions={},
        )
    names = ("product.manufacturer", "product.model", "build.version.release", "soc.model", "board.platform")
    properties = adb.try_shell(" && ".join(f"getprop ro.{name}" for name in names))
    if properties.code != 0:
        raise UserError(
            f"{adb.serial} is not the emulated ARM64 place, and no Android phone either, as it has no getprop: start "
            "the place with `python -m tools.arm64_device start`, and name it with --serial (docs/device.md)"
        )
    maker, model, release, soc, board = properties.output.split("\n")  # the last may be empty
    return PlaceDescription(
        where="phone",
        machine=machine,
        cpu=soc or board,
        system=f"{maker} {model}, Android {release}",
        emulator=None,
        versions={"android": release},
    )


def check_where(adb: Adb, place: PlaceDescription, where: Where) -> None:
    """Check that the device is the place of the command: a report is never stamped with another.

    Raises:
        UserError: it is another.
    """
    if place.where == where:
        return
    if place.where == "phone":
        raise UserError(f"{adb.serial} is a phone ({place.system}): say --where phone, with --app or --binary PATH")
    raise UserError(f"{adb.serial} is the emulated ARM64 place, and no phone: leave out --where phone")
