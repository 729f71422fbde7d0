"""`mtp-export device`: parity and speed on this machine, on the emulated ARM64 place, or on a phone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from mtp_export.cli.options import (
    bundle_argument,
    check_bundle_options,
    combined,
    context_length_option,
    debug_option,
    json_option,
    output_option,
    over_prompts,
)
from mtp_export.cli.output import working
from mtp_runtime.atomic import write_atomically
from mtp_runtime.errors import UserError

if TYPE_CHECKING:
    from mtp_export.device.bench import DeviceBench
    from mtp_export.device.runs import Job

_PLACES = ("host", "arm64-emulated", "phone")


# The options of every command over a device.
_shared = combined(
    bundle_argument,
    click.option("--serial", help="Device, as `adb devices` names it.  [the only one]"),
    click.option(
        "--where",
        type=click.Choice(_PLACES),
        default="arm64-emulated",
        show_default=True,
        help="Where to run: host takes no device.",
    ),
    click.option(
        "--binary",
        type=click.Path(path_type=Path),
        help="Run LiteRT-LM by this litert_lm_advanced_main for android_arm64; libraries beside it are pushed too.",
    ),
    click.option("--app", is_flag=True, help="Run LiteRT-LM by the sample app (android_demo), which is installed."),
    click.option("--backend", type=click.Choice(("cpu", "gpu")), default="cpu", show_default=True),
    over_prompts("JSONL: a text in each line.  [held-out prompts]", limit=8, max_new_tokens=64, threads=2),
    context_length_option,
    click.option(
        "--timeout", "silence_s", type=float, default=600.0, show_default=True, help="Longest silence, seconds."
    ),
    json_option("the report"),
    debug_option,
)


@click.group("device")
def command() -> None:
    """Run a bundle on a device over adb and compare it with this machine (docs/device.md)."""


@command.command("parity")
@_shared
@click.option("--no-stock", is_flag=True, help="Leave out stock LiteRT-LM.")
@output_option("Write device-parity.json and device-parity.md to this folder.  [the bundle]")
def parity(bundle: Path, no_stock: bool, output: Path | None, as_json: bool, debug: bool, **options: Any) -> None:
    """Check MTP on a place, and the place against this machine.

    On the place itself, MTP must give the tokens that it gives without. Against this machine, the place is fed the
    tokens from here, and its logits are compared at each. The bundle's files are pushed once; a push that was cut goes
    on where it was. Exit codes: 0 passed, 1 a difference that is no near-tie, 3 inconclusive because nothing was
    compared.
    """
    from mtp_export.device.parity import compare
    from mtp_export.device.report import EXIT_CODES
    from mtp_export.device.runs import run_both

    job = _job(bundle, stock=not no_stock, **options)
    with working("opening") as on_line:
        here, there = run_both(job, on_line)
    report = compare(bundle, job.request(str(bundle)), here, there)
    _write(output or bundle, {"device-parity.json": report.to_json(), "device-parity.md": report.to_markdown()})
    click.echo(report.to_json() if as_json else report.to_markdown(), nl=False)
    sys.exit(EXIT_CODES[report.outcome])


@command.command("bench")
@_shared
@click.option("--repetitions", type=int, default=3, show_default=True, help="Runs of each prompt, after a warm-up.")
@output_option("Write device-bench.json to this folder.  [the bundle]")
def bench(bundle: Path, repetitions: int, output: Path | None, as_json: bool, debug: bool, **options: Any) -> None:
    """Time LiteRT-LM there, with MTP off and on: tokens per second by kind of text, first token, memory, acceptance.

    Its caches are deleted before each variant. The times of an emulated place are withheld.
    """
    from mtp_export.device.bench import summarise
    from mtp_export.device.runs import measure

    check_bundle_options(bundle, {"--repetitions": repetitions})
    job = _job(bundle, stock=True, **options)
    with working("opening") as on_line:
        measurement = measure(job, repetitions, on_line)
    report = summarise(bundle, measurement)
    _write(output or bundle, {"device-bench.json": report.to_json()})
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        _print(report)


def _job(bundle: Path, *, prompts: Path | None, limit: int, **options: Any) -> Job:
    from mtp_export.check.prompts import heldout_prompts, in_turn, read_prompts
    from mtp_export.device.protocol import text_prompts
    from mtp_export.device.runs import Job

    counts = {"--limit": limit, "--max-new-tokens": options["max_new_tokens"], "--threads": options["threads"]}
    check_bundle_options(bundle, counts)
    chosen = in_turn(read_prompts(prompts) if prompts else heldout_prompts(), limit)
    job = Job(bundle=bundle, prompts=text_prompts(chosen), **options)
    job.check()
    return job


def _print(report: DeviceBench) -> None:
    console = Console()
    title = f"{report.model}, {report.recipe}, {report.backend}, {report.machine}"
    table = Table("kind", "prompts", "same text", title=title, title_justify="left")
    for name in ("MTP off, tok/s", "MTP on, tok/s", "gain"):
        table.add_column(name, justify="right")
    for kind in report.kinds:
        speeds = (_number(kind.tokens_per_second_off, ".1f"), _number(kind.tokens_per_second_on, ".1f"))
        table.add_row(kind.kind, str(kind.prompts), str(kind.same_text), *speeds, _number(kind.mtp_gain, ".2f", "x"))
    console.print(table)
    for variant in report.variants:
        console.print(
            f"K = {variant.num_draft_tokens}: opened in {_number(variant.open_s, '.1f', ' s')}, first token after "
            f"{_number(variant.first_token_ms, '.0f', ' ms')}, acceptance {_number(variant.acceptance_rate, '.2f')}, "
            f"peak memory {_number((variant.peak_memory_bytes or 0) / 1e6 or None, '.0f', ' MB')}"
        )
    for note in (*report.notes, *dict.fromkeys(warning for variant in report.variants for warning in variant.warnings)):
        console.print(f"note: {note}")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomically(folder / name, text)
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}: choose another --output") from error
