"""Starting and stopping the emulated place, and saying clearly where a kernel cannot have it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mtp_export.device.adb import adb_program
from mtp_runtime.errors import UserError
from tools.arm64_device.root import build_root

CPUS = ("cortex-a53", "cortex-a76")  # plain NEON; dot products and half precision
PORT = 5601
SERIAL = f"127.0.0.1:{PORT}"
_INSIDE = Path(__file__).with_name("inside.sh")
_UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--fork", "--mount-proc"]
_START_S = 30.0
_MAX_SOCKET_PATH = 100  # a socket's address has room for 108 bytes


class PlaceError(UserError):
    """The emulated place cannot be had on this machine, or did not start."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A running place: its state folder, and the process that all others of it end with."""

    state: Path
    pid: int

    @property
    def socket(self) -> str:
        """What `ADB_SERVER_SOCKET` must be for adb to see the place."""
        return f"localfilesystem:{self.state}/adb.socket"

    def stop(self) -> None:
        """End every process of the place; what was on its disk is gone."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        else:
            _wait_for_end(self.pid)
        (self.state / "pid").unlink(missing_ok=True)
        (self.state / "adb.socket").unlink(missing_ok=True)


def check_kernel() -> None:
    """Check that an unprivileged namespace can be made here, with emulated programs in it.

    Raises:
        PlaceError: it cannot; the message says what is lacking.
    """
    for program in ("unshare", "ip", "dpkg-deb"):
        if shutil.which(program) is None:
            raise PlaceError(f"the emulated ARM64 place needs the program {program}: install it")
    if os.uname().machine != "x86_64":
        raise PlaceError(f"the emulated ARM64 place is made for x86_64 machines, and this is {os.uname().machine}")
    tries = {
        "unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces)": "true",
        "binfmt_misc in user namespaces (Linux 6.7 or newer)": "mount -t binfmt_misc none /proc/sys/fs/binfmt_misc",
    }
    for lacking, command in tries.items():
        done = subprocess.run([*_UNSHARE, "sh", "-c", command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            output = " ".join(done.stderr.split()) or f"exit {done.returncode}"
            raise PlaceError(f"this kernel ({os.uname().release}) does not give {lacking}: {output}")


def start(state: Path, *, cpu: str = CPUS[-1], disk_mib: int = 1024) -> Place:
    """Start the place with `state` as the folder of its socket and logs, and wait until adb sees it.

    Raises:
        PlaceError: the kernel cannot, it runs already, or it did not come up.
        FetchError: what it is made of cannot be fetched.
    """
    if len(str(state / "adb.socket")) > _MAX_SOCKET_PATH:
        raise PlaceError(f"{state} is too long a path for a socket: give a folder with a shorter one")
    if running(state):
        raise PlaceError(f"a place runs already in {state}: stop it first, or give another --state")
    check_kernel()
    prepared = build_root()
    adb = adb_program()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    (state / "adb.socket").unlink(missing_ok=True)
    arguments = [str(prepared), str(state), cpu, str(PORT), str(disk_mib), adb]
    with (state / "place.log").open("wb") as log:
        # --kill-child: killing unshare ends the namespace's first process, and with it all others.
        process = subprocess.Popen(
            [*_UNSHARE, "--kill-child", "sh", str(_INSIDE), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    place = Place(state=state, pid=process.pid)
    (state / "pid").write_text(str(process.pid), encoding="utf-8")
    try:
        _connect(place, adb, process)
    except BaseException:
        place.stop()
        raise
    return place


def running(state: Path) -> Place | None:
    """Return the place that runs with this state folder, if one does."""
    try:
        pid = int((state / "pid").read_text(encoding="utf-8"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return Place(state=state, pid=pid) if str(state).encode() in command.split(b"\0") else None


@contextmanager
def started(state: Path, *, cpu: str = CPUS[-1], disk_mib: int = 1024) -> Iterator[Place]:
    """Have the place for a block."""
    place = start(state, cpu=cpu, disk_mib=disk_mib)
    try:
        yield place
    finally:
        place.stop()


def _connect(place: Place, adb: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if (place.state / "adb.socket").exists():
            done = subprocess.run(
                [adb, "connect", SERIAL],
                env={**os.environ, "ADB_SERVER_SOCKET": place.socket},
                capture_output=True,
                text=True,
                timeout=_START_S,
                check=False,
            )
            if done.stdout.startswith(("connected", "already connected")):
                return
        time.sleep(0.1)
    logs = [(place.state / name) for name in ("place.log", "adb-server.log", "adbd.log")]
    lines = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()[-2:]]
    raise PlaceError(f"the emulated ARM64 place did not start: {' / '.join(lines) or 'its logs are empty'}")


def _wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        try:
            # Ours, if this process started it; another's otherwise, which is gone when it can be signalled no more.
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return
        except ChildProcessError:
            if not Path(f"/proc/{pid}").exists():
                return
        time.sleep(0.02)
