"""`mtp-export report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mtp_export.cli.options import check_bundle_options
from mtp_export.cli.output import working
from mtp_export.machine import processor
from mtp_runtime.errors import UserError


@click.command("report")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), help="JSONL, as for calibrate.  [32 in four kinds]")
@click.option("--limit", type=int, default=16, show_default=True, help="Use so many, of all kinds in turn.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--device", help="What to call this device.  [its processor]")
@click.option(
    "--bench",
    "benches",
    multiple=True,
    type=click.Path(path_type=Path),
    help="What `bench --json` printed on another device: also say when drafts pay there.",
)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write report.html, report.json there.  [the bundle]")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
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
    with working("opening") as tell:
        report = _report(
            bundle,
            prompts,
            limit,
            max_new_tokens,
            device or processor(),
            benches,
            threads,
            tell,
        )
    folder = output or bundle
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.json", report.to_json()), ("report.html", report.to_html())):
            beside = folder / f"{name}.partial"
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, folder / name)
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}: choose another --output") from error
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        for place in report.devices:
            click.echo(f"on {place.name}, {place.advice}")
        click.echo(f"written: {click.format_filename(folder / 'report.html')}, report.json")


def _report(
    bundle: Path,
    prompts: Path | None,
    limit: int,
    max_new_tokens: int,
    device: str,
    benches: tuple[Path, ...],
    threads: int,
    on_prompt: Any,
) -> Any:
    from mtp_calibration.report.acceptance import measure_acceptance, on_device, read_bench
    from mtp_calibration.report.report import Example, Report
    from mtp_calibration.same_model.observe import text_of
    from mtp_export.check.prompts import calibration_prompts, in_turn, read_prompts
    from mtp_runtime import Session

    chosen = in_turn(read_prompts(prompts) if prompts else calibration_prompts(), limit)
    with Session.open(bundle, threads=threads) as session:
        others = [read_bench(path, session.manifest.model) for path in benches]
        rows, costs, traces = measure_acceptance(session, chosen, max_new_tokens=max_new_tokens, on_prompt=on_prompt)
        kinds: dict[str, Example] = {}
        for prompt, trace in traces:
            example = Example(
                prompt_id=prompt.id,
                kind=prompt.kind,
                prompt=text_of(session, prompt),
                pieces=tuple(session.text_pieces(trace.tokens)),
                origins=trace.origins,
            )
            kinds.setdefault(prompt.kind, example)
        return Report(
            manifest=session.manifest,
            rows=tuple(rows),
            devices=tuple(on_device(name, found, rows) for name, found in ((device, costs), *others)),
            examples=tuple(kinds.values()),
            calibration=_calibration(bundle),
        )


def _calibration(bundle: Path) -> dict[str, object] | None:
    """What `calibrate` wrote of this bundle.

    Raises:
        UserError: it is not what it wrote.
    """
    import msgspec

    path = bundle / "calibration.json"
    if not path.is_file():
        return None
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): run mtp-export calibrate again") from error
    if not {"passed", "quality", "verdict"} <= found.keys():
        raise UserError(f"{path} is not what calibrate writes: run mtp-export calibrate again")
    return found
