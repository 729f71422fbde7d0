"""`mtp-export calibrate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mtp_export.cli.options import check_bundle_options
from mtp_export.cli.output import working
from mtp_runtime.atomic import write_atomically
from mtp_runtime.errors import UserError

_PROMPTS = 16


@click.command("calibrate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", metavar="DIR|ID", help="Target checkpoint that it was made from.  [model's own]")
@click.option("--drafter", metavar="DIR|ID", help="Drafter checkpoint, likewise.  [model's own]")
@click.option(
    "--adapter", "adapters", metavar="DIR", multiple=True, type=click.Path(path_type=Path), help="Merged LoRA adapter."
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="JSONL with a text, or messages and tools, per line.  [32 in four kinds]",
)
@click.option("--limit", type=int, default=_PROMPTS, show_default=True, help="Use so many, of all kinds in turn.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--max-kl", type=float, help="Bar for KL(float || bundle) per token, in nats.  [the recipe's]")
@click.option("--min-agreement", type=float, help="Bar for the share of equal first choices.  [the recipe's]")
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write calibration.json there.  [the bundle]")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
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
    """Measure whether a bundle is still the model that it was made from, hop by hop and as a whole.

    Ends with exit code 1 if a bar is missed or something is wrong, with the diagnosis.
    """
    check_bundle_options(bundle, {"--limit": limit, "--max-new-tokens": max_new_tokens, "--threads": threads})
    with working("loading") as tell:
        found = _calibrate(
            bundle,
            (checkpoint, drafter, adapters),
            prompts,
            limit,
            (max_kl, min_agreement),
            threads=threads,
            max_new_tokens=max_new_tokens,
            on_stage=tell,
        )
    folder = output or bundle
    path = folder / "calibration.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, found.to_json())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}: choose another --output") from error
    if as_json:
        click.echo(found.to_json(), nl=False)
    else:
        _print(found)
        click.echo(f"written: {click.format_filename(path)}")
    if not found.passed:
        click.echo(f"mtp-export: error: {found.verdict.summary}", err=True)
    sys.exit(0 if found.passed else 1)


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
    given = {name: bar for name, bar in zip(("kl_per_token", "top1_agreement"), bars, strict=True) if bar is not None}
    bars_of_recipe = msgspec.structs.replace(bars_for(manifest.recipe), **given)
    how = CalibrationOptions(bars=bars_of_recipe, threads=threads, max_new_tokens=max_new_tokens)
    return calibrate(bundle, pair, chosen, how, on_stage=on_stage)


def _print(found: Any) -> None:
    quality, bars = found.quality, found.verdict.bars
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
    click.echo(f"{found.model}, {found.recipe}: {quality.texts} texts, {quality.tokens} tokens")
    for name, value, bar in rows:
        click.echo(f"  {name:30} {value:52} {bar}".rstrip())
    for finding in found.verdict.findings:
        click.echo(f"  {finding.part}: {finding.diagnosis}")
    click.echo("PASSED" if found.passed else "FAILED: " + "; ".join(found.verdict.missed or ("see above",)))
