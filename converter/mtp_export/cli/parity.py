"""`mtp-export parity`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from mtp_export.cli.output import working
from mtp_runtime.atomic import write_atomically
from mtp_runtime.errors import UserError


@click.command("parity")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), help="JSONL with a text per line.  [32 held-out prompts]")
@click.option("--limit", type=int, help="Use so many prompts, of all kinds in turn.")
@click.option("--max-new-tokens", type=int, default=128, show_default=True)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Target checkpoint, for transformers.  [nano's own]"
)
@click.option("--no-stock", is_flag=True, help="Leave out stock LiteRT-LM.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write parity.json and parity.md there.  [the bundle]")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(
    bundle: Path,
    prompts: Path | None,
    limit: int | None,
    max_new_tokens: int,
    checkpoint: Path | None,
    no_stock: bool,
    threads: int,
    output: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Run the same prompts through every runtime, with MTP off and on, and compare token by token.

    Ends with exit code 1 on any difference that is not a stated near-tie.
    """
    from mtp_export.check.parity import prove
    from mtp_export.check.prompts import heldout_prompts, in_turn, read_prompts

    if checkpoint is not None and not checkpoint.is_dir():
        raise UserError(f"no checkpoint at {checkpoint}: give the folder that the bundle was exported from")
    chosen = in_turn(read_prompts(prompts) if prompts else heldout_prompts(), limit)
    with working("opening") as tell:
        report = prove(
            bundle,
            chosen,
            max_new_tokens=max_new_tokens,
            threads=threads,
            checkpoint=checkpoint or _embedded(bundle),
            stock=not no_stock,
            on_run=tell,
        )
    folder = output or (bundle if bundle.is_dir() else bundle.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "parity.json", report.to_json())
        write_atomically(folder / "parity.md", report.to_markdown())
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}: choose another --output") from error
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        _print(report, folder)
    sys.exit(0 if report.passed else 1)


def _embedded(bundle: Path) -> Path | None:
    """nano's own checkpoint, if the bundle was made from it; any other must be named."""
    from mtp_runtime import read_manifest

    if not bundle.is_dir():
        return None
    from mtp_export.source.checkpoint import hash_file
    from mtp_export.source.embedded import EMBEDDED

    weights = EMBEDDED / "target" / "model.safetensors"
    made_from = {entry.sha256 for entry in read_manifest(bundle).inputs}
    return weights.parent if hash_file(weights).sha256 in made_from else None


def _print(report, folder: Path) -> None:  # type: ignore[no-untyped-def]  # ParityReport, imported when it runs
    console = Console()
    table = Table(title=f"{report.model}, {report.recipe}: {report.max_new_tokens} tokens per prompt, greedy")
    for name in ("runtime", "MTP", "same output", "committed/round", "tok/s", "against plain"):
        table.add_column(name, justify="left" if name == "runtime" else "right")
    plain = {r.runner: r.tokens_per_second for r in report.results if r.num_draft_tokens == 0}
    for result in report.results:
        ties, wrong, total = result.count("near_tie"), result.count("different"), len(result.comparisons)
        reference = result is report.results[0]
        same = (
            "reference"
            if reference
            else "yes"
            if not ties and not wrong
            else f"{total - ties - wrong} of {total}, {ties} near-ties"
        )
        speed, base = result.tokens_per_second, plain.get(result.runner)
        table.add_row(
            result.runner,
            f"K = {result.num_draft_tokens}" if result.num_draft_tokens else "off",
            same if not wrong else f"{same}, {wrong} DIFFERENT",
            "–" if result.committed_per_round is None else f"{result.committed_per_round:.2f}",
            f"{speed:.0f}" if speed else "–",
            f"{speed / base:.2f}x" if speed and base else "–",
        )
    console.print(table)
    for result in report.results:
        for comparison in result.comparisons:
            if comparison.verdict == "different":
                runner = f"{result.runner}{', MTP' if result.num_draft_tokens else ''}"
                place = comparison.detail or f"token {comparison.first_difference}"
                console.print(f"DIFFERENT: {runner}, {comparison.prompt}: {place}", soft_wrap=True, markup=False)
    for finding in report.findings:
        console.print(f"WRONG: {finding}", soft_wrap=True, markup=False)
    for note in report.notes:
        console.print(note, soft_wrap=True, markup=False)
    for reason in report.left_out:
        console.print(f"left out: {reason}", soft_wrap=True, markup=False)
    console.print(
        f"{'PASSED' if report.passed else 'FAILED'}; near-tie: the two best logits within {report.tolerance:g} where "
        f"outputs part. Written: {folder}/parity.json, parity.md",
        soft_wrap=True,
    )
