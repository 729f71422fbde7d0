"""Failures of devices, against the real adb: each ends in one line with its remedy."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtp_export.device.adb import FOLDER, Adb, AdbError, adb_program, devices
from mtp_export.device.transfer import Sent, send
from tests.conftest import run_cli
from tests.device.fake_daemon import daemon
from tools.arm64_device.place import SERIAL, Place

pytestmark = pytest.mark.arm64


def adb(*arguments: str) -> str:
    return subprocess.run([adb_program(), *arguments], capture_output=True, text=True, check=False).stdout


def random_file(path: Path, size: int) -> Sent:
    data = os.urandom(size)
    path.write_bytes(data)
    return Sent(path, hashlib.sha256(data).hexdigest(), size)


def wait_for_state(serial: str, state: str) -> None:
    deadline = time.monotonic() + 20
    while not any(device.serial == serial and device.state == state for device in devices(adb_program())):
        assert time.monotonic() < deadline, devices(adb_program())
        time.sleep(0.1)


def test_no_device(lonely_server: str, tmp_path: Path) -> None:
    done = run_cli("device", "parity", str(tmp_path), check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "mtp-export: error: no device: start the emulated one (`python -m tools.arm64_device start`, docs/device.md)\n"
    )
    with pytest.raises(AdbError, match=r"^no device abc: adb sees none$"):
        Adb.open("abc")


@pytest.mark.parametrize(
    ("behaviour", "state", "remedy"),
    [
        ("never trusts", "unauthorized", "accept 'Allow USB debugging'"),
        ("never answers", "offline", "plug it in again"),
    ],
)
def test_a_device_that_is_not_ready(lonely_server: str, behaviour: str, state: str, remedy: str) -> None:
    with daemon(behaviour) as serial:  # type: ignore[arg-type]  # the two words that it takes
        connecting = subprocess.Popen([lonely_server, "connect", serial], stdout=subprocess.DEVNULL)
        wait_for_state(serial, state)
        with pytest.raises(AdbError, match=rf"{serial} is \w+: .*{remedy}"):
            Adb.open()
        connecting.kill()
        connecting.wait()


def test_several_devices(place: Place) -> None:
    second = SERIAL.replace("127.0.0.1", "localhost")
    adb("connect", second)
    try:
        with pytest.raises(AdbError, match=r"several devices are connected: .*: name one with --serial"):
            Adb.open()
        assert Adb.open(SERIAL).shell("uname -m") == "aarch64"
    finally:
        adb("disconnect", second)


def test_programs_that_end_badly(place: Place) -> None:
    device = Adb.open()
    with pytest.raises(AdbError, match=r"has no program litert_lm_advanced_main: .*not found"):
        device.shell("litert_lm_advanced_main --help")
    with pytest.raises(AdbError, match=r"cat ended with 1: cat: /absent: No such file"):
        device.shell("cat /absent")
    with pytest.raises(AdbError, match=r"does not let adb|read-only"):
        device.shell("touch /opt/site/x")
    with pytest.raises(AdbError, match=r"no sign of life for 1 s.*--timeout"):
        Adb.open(silence_s=1.0).shell("sleep 30")
    with pytest.raises(AdbError, match="absent"):
        device.pull(f"{FOLDER}/absent", Path("absent"))


@contextlib.contextmanager
def killed_meanwhile(program: str) -> Iterator[None]:
    """Kill a program of the device a second after the block begins."""
    killer = threading.Timer(1.0, Adb.open().try_shell, [f"pkill -9 {program}"])
    killer.start()
    yield
    killer.join()


def test_killed_when_memory_is_low(place: Place) -> None:
    """SIGKILL is what Android's low-memory killer sends."""
    with (
        killed_meanwhile("sleep"),
        pytest.raises(AdbError, match=r"sleep was killed on .*memory runs low: close"),
    ):
        Adb.open().shell("sleep 30")


def test_disk_full(place: Place, tmp_path: Path) -> None:
    device, file = Adb.open(), random_file(tmp_path / "weights", 8 << 20)
    device.shell(f"rm -rf {FOLDER} && mkdir -p {FOLDER} && fallocate -l 1020M {FOLDER}/fill")
    try:
        with pytest.raises(AdbError, match=r"has \d MB free in .* and 8 MB are to be sent: free some space"):
            send(device, [file], f"{FOLDER}/full")
        with pytest.raises(AdbError, match=r"No space left on device: its disk is full: free space there"):
            device.shell(f"cat > {FOLDER}/full/x", stdin=[file.path.read_bytes()])
    finally:
        device.shell(f"rm -r {FOLDER}/fill {FOLDER}/full")


def test_the_cable_is_pulled_in_mid_push(place: Place, tmp_path: Path) -> None:
    file, folder = random_file(tmp_path / "weights", 24 << 20), f"{FOLDER}/cable"
    pulled = threading.Event()

    def pull(sent: int, total: int) -> None:
        if sent > 8 << 20 and not pulled.is_set():
            pulled.set()
            adb("disconnect", SERIAL)

    with pytest.raises(AdbError, match=r"connection to .* was lost: plug it in again .* goes on where it was cut"):
        send(Adb.open(), [file], folder, pull)
    adb("connect", SERIAL)
    device = Adb.open()
    assert device.shell(f"ls {folder}") == f"weights.{file.sha256[:16]}.part"
    rest = send(device, [file], folder).sent_bytes
    assert 0 < rest < file.size_bytes - (2 << 20)
    assert device.shell(f"sha256sum {folder}/weights").split()[0] == file.sha256
    assert send(device, [file], folder).sent_bytes == 0
    device.shell(f"rm -r {folder}")


def test_a_damaged_part_is_noticed_and_not_kept(place: Place, tmp_path: Path) -> None:
    device, file, folder = Adb.open(), random_file(tmp_path / "weights", 100_000), f"{FOLDER}/damaged"
    device.shell(f"mkdir -p {folder} && head -c 5000 /dev/zero > {folder}/weights.{file.sha256[:16]}.part")
    with pytest.raises(AdbError, match=r"arrived on .* with SHA-256 .*: run it again"):
        send(device, [file], folder)
    assert send(device, [file], folder).sent_bytes == file.size_bytes
    device.shell(f"rm -r {folder}")


def test_the_daemon_dies_during_a_run(place: Place) -> None:
    with killed_meanwhile("adbd"), pytest.raises(AdbError, match=r"the connection to .* was lost"):
        Adb.open().shell("sleep 30")
    time.sleep(0.5)
    adb("disconnect", SERIAL)
    deadline = time.monotonic() + 20
    while "connected" not in adb("connect", SERIAL):
        assert time.monotonic() < deadline
    assert Adb.open().shell("uname -m") == "aarch64"


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, mtp_export.cli.device, mtp_export.device.adb; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
