"""`mtp-export device`: parity on this machine or on the emulated ARM64 place."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from mtp_runtime.errors import UserError

if TYPE_CHECKING:
    from mtp_export.device.protocol import Answer, Request

_PLACES = ("host", "arm64-emulated")


@click.group("device")
def command() -> None:
    """Run a bundle on a device over adb and compare it with this machine (docs/device.md)."""


@command.command("parity")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--serial", help="Device, as `adb devices` names it.  [the only one]")
@click.option(
    "--where",
    type=click.Choice(_PLACES),
    default="arm64-emulated",
    show_default=True,
    help="Where to run: host takes no device.",
)
@click.option("--prompts", type=click.Path(path_type=Path), help="JSONL with a text per line.  [held-out prompts]")
@click.option("--limit", type=int, default=8, show_default=True, help="Use so many prompts, of all kinds in turn.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--no-stock", is_flag=True, help="Leave out stock LiteRT-LM.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--timeout", "silence_s", type=float, default=600.0, show_default=True, help="Longest silence, seconds.")
@click.option("--output", type=click.Path(path_type=Path), help="Write device-parity.json and .md there.  [the bundle]")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def parity(
    bundle: Path,
    serial: str | None,
    where: str,
    prompts: Path | None,
    limit: int,
    max_new_tokens: int,
    no_stock: bool,
    threads: int,
    silence_s: float,
    output: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Run the same prompts there and here, with MTP off and on, and compare token by token.

    The bundle's files are pushed once; a push that was cut goes on where it was. Ends with exit code 1 on any
    difference that is not a stated near-tie.
    """
    from mtp_calibration.corpus import heldout_prompts, in_turn, read_prompts
    from mtp_export.device.parity import compare, request_for
    from mtp_export.device.places import run_here
    from mtp_export.device.protocol import asked

    if max_new_tokens < 1 or threads < 1:
        raise UserError("--max-new-tokens and --threads must be 1 or more")
    if not bundle.is_dir():
        raise UserError(f"{bundle} is no folder: give the folder of a bundle, which has its manifest")
    chosen = asked(in_turn(read_prompts(prompts) if prompts else heldout_prompts(), limit))
    console = Console(stderr=True)
    with console.status("opening") if console.is_terminal else contextlib.nullcontext() as status:

        def on_line(text: str) -> None:
            if status:
                status.update(text)

        def ask(folder: str) -> Request:
            return request_for(
                bundle, folder, chosen, max_new_tokens=max_new_tokens, stock=not no_stock, threads=threads
            )

        if where == "host":
            on_line("on this machine")
            here = there = run_here(ask(str(bundle)))
        else:
            there = _on_device(bundle, serial, silence_s, ask, on_line)
            on_line("on this machine")
            here = run_here(ask(str(bundle)))
    report = compare(bundle, ask(str(bundle)), here, there)
    folder = output or bundle
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "device-parity.json", report.to_json())
        _write(folder / "device-parity.md", report.to_markdown())
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}: choose another --output") from error
    click.echo(report.to_json() if as_json else report.to_markdown(), nl=False)
    sys.exit(0 if report.parity.passed else 1)


def _on_device(
    bundle: Path,
    serial: str | None,
    silence_s: float,
    ask: Callable[[str], Request],
    on_line: Callable[[str], None],
) -> Answer:
    from mtp_export.device.adb import Adb
    from mtp_export.device.places import check_emulated, run_with_python
    from mtp_export.device.transfer import send_bundle

    adb = Adb.open(serial, silence_s=silence_s)
    check_emulated(adb)
    there = send_bundle(adb, bundle, lambda sent, total: on_line(f"pushing: {sent / 1e6:.0f} of {total / 1e6:.0f} MB"))
    return run_with_python(adb, ask(there.folder), lambda line: on_line(f"{adb.serial}: {line}"))


def _write(path: Path, text: str) -> None:
    """Write beside and rename: whoever reads it never sees half a report."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)
