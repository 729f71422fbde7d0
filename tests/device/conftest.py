"""Emulated ARM64 places behind a real adb; where the kernel cannot have one, tests are skipped and say why."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mtp_export.device.adb import adb_program
from tools.arm64_device.place import Place, PlaceError, check_kernel, started
from tools.fetched.debian import FetchError

OpenPlace = Callable[[str], Place]


@pytest.fixture(scope="session")
def open_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenPlace]:
    """Start the place with a CPU, once for all tests."""
    places: dict[str, Place] = {}
    with ExitStack() as stack:

        def start(cpu: str) -> Place:
            if cpu not in places:
                try:
                    check_kernel()
                    places[cpu] = stack.enter_context(started(tmp_path_factory.mktemp("p") / cpu, cpu=cpu))
                except (PlaceError, FetchError) as error:
                    pytest.skip(f"no emulated ARM64 place: {error}")
            return places[cpu]

        yield start


@pytest.fixture
def place(open_place: OpenPlace, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place, which adb sees during the test."""
    place = open_place("cortex-a76")
    monkeypatch.setenv("ADB_SERVER_SOCKET", place.socket)
    return place


@pytest.fixture
def lonely_server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real adb server without devices, on a socket of its own; gives adb's program."""
    program, folder = adb_program(), tmp_path_factory.mktemp("s")
    monkeypatch.setenv("ADB_SERVER_SOCKET", f"localfilesystem:{folder}/adb.socket")
    monkeypatch.setenv("ADB_MDNS", "0")
    command = [program, "-L", os.environ["ADB_SERVER_SOCKET"], "server", "nodaemon"]
    log = (folder / "log").open("wb")
    server = subprocess.Popen(command, env={**os.environ, "HOME": str(folder)}, stdout=log, stderr=log)
    _wait_for(folder / "adb.socket", server)
    yield program
    server.kill()
    server.wait()
    log.close()


def _wait_for(socket: Path, server: subprocess.Popen[bytes]) -> None:
    while not socket.exists():
        assert server.poll() is None, "adb's server has ended"
