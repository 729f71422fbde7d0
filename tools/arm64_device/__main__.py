"""`python -m tools.arm64_device start|stop|run`: the emulated ARM64 place, for adb and `mtp-export device`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from mtp_runtime.errors import MtpError
from tools.arm64_device.place import CPUS, SERIAL, check_kernel, running, start, started
from tools.arm64_device.root import build_root
from tools.fetched.cache import cache_folder

_STATE = click.option("--state", type=click.Path(path_type=Path), help="Folder of its socket and logs.  [the cache]")
_CPU = click.option("--cpu", type=click.Choice(CPUS), default=CPUS[-1], show_default=True)


@click.group()
def main() -> None:
    """An ARM64 root with Debian's adbd and the aarch64 runtimes, on an emulated CPU, behind a real adb."""


@main.command("build")
def build() -> None:
    """Fetch and prepare what it is made of, once (about 50 MB of packages and 80 MB of wheels)."""
    check_kernel()
    click.echo(build_root())


@main.command("start")
@_CPU
@_STATE
def start_command(cpu: str, state: Path | None) -> None:
    """Start it, and print what the environment must say for adb to see it."""
    place = start(_state(state), cpu=cpu)
    click.echo(f"export ADB_SERVER_SOCKET={place.socket} ANDROID_SERIAL={SERIAL}")


@main.command("stop")
@_STATE
def stop_command(state: Path | None) -> None:
    """Stop it; what was on its disk is gone."""
    place = running(_state(state))
    if place is None:
        raise click.ClickException(f"no place runs in {_state(state)}")
    place.stop()


@main.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_CPU
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run_command(cpu: str, command: tuple[str, ...]) -> None:
    """Run COMMAND with the place for its adb, and stop the place after it."""
    with tempfile.TemporaryDirectory(prefix="mtp-") as folder, started(Path(folder) / "place", cpu=cpu) as place:
        environ = {**os.environ, "ADB_SERVER_SOCKET": place.socket}
        code = subprocess.run(command, env=environ, check=False).returncode
    sys.exit(code)


def _state(option: Path | None) -> Path:
    return option or cache_folder() / "arm64-place"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except MtpError as error:
        click.echo(f"arm64_device: error: {error}", err=True)
        sys.exit(error.exit_code)
