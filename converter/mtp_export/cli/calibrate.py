"""`mtp-export calibrate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mtp_export.cli.exit_codes import FAILED, OK
from mtp_export.cli.options import (
    adapter_option,
    bundle_argument,
    check_bundle_options,
    checkpoint_options,
    debug_option,
    json_option,
    output_option,
    over_prompts,
)
from mtp_export.cli.output import working
from mtp_runtime.atomic import write_atomically
from mtp_runtime.errors import UserError

_PROMPTS = 16


@click.command("calibrate")
@bundle_argument
@checkpoint_options("The target that the bundle was made from.", "The drafter that the bundle was made from.")
@adapter_option
@over_prompts(
    "JSONL: a text, or messages and tools, in each line.  [32 of the package, in four kinds]",
    limit=_PROMPTS,
    max_new_tokens=64,
    threads=1,
    output="answer",
)
@click.option("--max-kl", type=float, help="Largest KL(float || bundle) per token that passes, in nats.  [by recipe]")
@click.option("--min-agreement", type=float, help="Smallest share of equal first choices that passes.  [by recipe]")
@output_option("Write calibration.json to this folder.  [the bundle]")
@json_option("the measurements")
@debug_option
def command(
    bundle: Path,
    checkpoint: str | None,
    drafter: str | None,
    adapters: tuple[Path, ...],
    prompts: Path | None,
    limit: int,
    max_new_tokens: int,
    max_kl: float | None,
    min_agreement: float | None,
    threads: int,
    output: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Check that a bundle is still the model that it was made from.

    Every stored weight, every part of the graphs and the whole answers are compared with the checkpoint in float32.
    The exit code is 1 if a bar is missed or a part is wrong; the message then names the part.
    """
    check_bundle_options(bundle, {"--limit": limit, "--max-new-tokens": max_new_tokens, "--threads": threads})
    with working("loading") as show:
        calibration = _calibrate(
            bundle,
            (checkpoint, drafter, adapters),
            prompts,
            limit,
            (max_kl, min_agreement),
            threads=threads,
            max_new_tokens=max_new_tokens,
            on_stage=show,
        )
    folder = output or bundle
    path = folder / "calibration.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, calibration.to_json())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}: choose another --output") from error
    if as_json:
        click.echo(calibration.to_json(), nl=False)
    else:
        _print(calibration)
        click.echo(f"written: {click.format_filename(path)}")
    if not calibration.passed:
        click.echo(f"mtp-export: error: {calibration.verdict.summary}", err=True)
    sys.exit(OK if calibration.passed else FAILED)


def _calibrate(
    bundle: Path,
    inputs: tuple[str | None, str | None, tuple[Path, ...]],
    prompts: Path | None,
    limit: int,
    bars: tuple[float | None, float | None],
    *,
    threads: int,
    max_new_tokens: int,
    on_stage: Callable[[str], None],
) -> Any:
    import msgspec

    from mtp_calibration.same_model.calibrate import CalibrationOptions, calibrate, check_inputs
    from mtp_calibration.same_model.gate import bars_for
    from mtp_export.check.prompts import calibration_prompts, in_turn, read_prompts
    from mtp_export.source.pair import open_made_from
    from mtp_runtime import read_manifest

    manifest = read_manifest(bundle)
    chosen = in_turn(read_prompts(prompts) if prompts else calibration_prompts(), limit)
    checkpoint, drafter, adapters = inputs
    pair = open_made_from(manifest.model, checkpoint, drafter, adapters)
    check_inputs(pair, manifest)
    names = ("kl_per_token", "top1_agreement")
    own_bars = {name: bar for name, bar in zip(names, bars, strict=True) if bar is not None}
    recipe_bars = msgspec.structs.replace(bars_for(manifest.recipe), **own_bars)
    calibration_options = CalibrationOptions(bars=recipe_bars, threads=threads, max_new_tokens=max_new_tokens)
    return calibrate(bundle, pair, chosen, calibration_options, on_stage=on_stage)


def _print(calibration: Any) -> None:
    quality, verdict = calibration.quality, calibration.verdict
    bars = verdict.bars
    drafter, structured = quality.drafter, quality.structured
    parted = [d for d in quality.divergences if d.first is not None]
    rows = (
        ("KL per token", f"{quality.kl_per_token:.4g}", f"at most {bars.kl_per_token:g}"),
        ("  of it by weights alone", f"{quality.weights_kl_per_token:.4g}", ""),
        ("same first choice", f"{quality.top1_agreement:.2%}", f"at least {bars.top1_agreement:.0%}"),
        (
            "perplexity",
            f"{quality.perplexity:.3f}, float {quality.float_perplexity:.3f}",
            f"at most {bars.perplexity_ratio:g} times",
        ),
        ("answers that part from float", f"{len(parted)} of {len(quality.divergences)}", ""),
        (
            "accepted drafts a round",
            f"{drafter.accepted_per_round:.2f} of {drafter.num_draft_tokens}, float {drafter.float_same_rounds:.2f}",
            f"at least {bars.accepted_share:.0%} of float",
        ),
        (
            "float pair by position",
            "{:.2f} at L - 1, {:.2f} at L".format(*drafter.float_accepted_per_round),
            f"one of them better by 3 x {drafter.float_difference_error:.3f} counts",
        ),
        ("valid structured answers", f"{structured.valid}, float {structured.float_valid} of {structured.prompts}", ""),
        ("worst layers", ", ".join(f"{e.layer} {e.kl:.3g}" for e in quality.layers[:3]), ""),
    )
    click.echo(f"{calibration.model}, {calibration.recipe}: {quality.texts} texts, {quality.tokens} tokens")
    for name, value, bar in rows:
        click.echo(f"  {name:30} {value:52} {bar}".rstrip())
    for finding in verdict.findings:
        click.echo(f"  {finding.part}: {finding.diagnosis}")
    click.echo("PASSED" if calibration.passed else "FAILED: " + "; ".join(verdict.missed or ("see above",)))
