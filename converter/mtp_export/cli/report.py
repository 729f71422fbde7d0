"""`mtp-export report`."""

from __future__ import annotations

from pathlib import Path

import click

from mtp_export.cli.options import (
    bundle_argument,
    check_bundle_options,
    debug_option,
    json_option,
    output_option,
    over_prompts,
)
from mtp_export.cli.output import working
from mtp_export.machine import processor
from mtp_runtime.atomic import write_atomically
from mtp_runtime.errors import UserError


@click.command("report")
@bundle_argument
@over_prompts(
    "JSONL, as for `calibrate`.  [32 of the package, in four kinds]",
    limit=16,
    max_new_tokens=64,
    threads=1,
    output="answer",
)
@click.option("--device", help="What to call this device.  [its processor]")
@click.option(
    "--bench",
    "benches",
    multiple=True,
    type=click.Path(path_type=Path),
    help="JSON that `bench` or `device bench` printed of another device: also report when drafts pay there.",
)
@output_option("Write report.html and report.json to this folder.  [the bundle]")
@json_option("the report")
@debug_option
def command(
    bundle: Path,
    prompts: Path | None,
    limit: int,
    max_new_tokens: int,
    device: str | None,
    benches: tuple[Path, ...],
    threads: int,
    output: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Write one HTML page about a bundle: sizes, quality (if `calibrate` was run), how drafts fare by kind of prompt
    and K on this device, when they pay, and examples with the origin of each token."""
    check_bundle_options(bundle, {"--limit": limit, "--max-new-tokens": max_new_tokens, "--threads": threads})
    from mtp_calibration.report.make import ReportRequest, make_report
    from mtp_export.check.prompts import calibration_prompts, in_turn, read_prompts

    request = ReportRequest(
        bundle=bundle,
        prompts=tuple(in_turn(read_prompts(prompts) if prompts else calibration_prompts(), limit)),
        max_new_tokens=max_new_tokens,
        device=device or processor(),
        benches=benches,
        threads=threads,
    )
    with working("opening") as on_prompt:
        report = make_report(request, on_prompt)
    folder = output or bundle
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.json", report.to_json()), ("report.html", report.to_html())):
            write_atomically(folder / name, text)
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}: choose another --output") from error
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        for place in report.devices:
            click.echo(f"on {place.name}, {place.advice}")
        click.echo(f"written: {click.format_filename(folder / 'report.html')}, report.json")
