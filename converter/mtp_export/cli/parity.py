"""`mtp-export parity`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from mtp_export.cli.options import (
    bundle_argument,
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
    from mtp_runtime.measure.parity import ParityReport, RunnerResult


@click.command("parity")
@bundle_argument
@over_prompts("JSONL: a text in each line.  [32 held-out prompts]", limit=None, max_new_tokens=128, threads=2)
@context_length_option
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Target checkpoint, for transformers.  [nano's own]"
)
@click.option("--no-stock", is_flag=True, help="Leave out stock LiteRT-LM.")
@output_option("Write parity.json and parity.md to this folder.  [the bundle]")
@json_option("the report")
@debug_option
def command(
    bundle: Path,
    prompts: Path | None,
    limit: int | None,
    max_new_tokens: int,
    checkpoint: Path | None,
    no_stock: bool,
    threads: int,
    context_length: int | None,
    output: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Run the same prompts through every runtime, with MTP off and on, and compare token by token.

    Ends with exit code 1 on any difference that is not a stated near-tie.
    """
    from mtp_export.check.parity import ParityRequest, prove
    from mtp_export.check.prompts import heldout_prompts, in_turn, read_prompts

    if checkpoint is not None and not checkpoint.is_dir():
        raise UserError(f"no checkpoint at {checkpoint}: give the folder that the bundle was exported from")
    chosen = in_turn(read_prompts(prompts) if prompts else heldout_prompts(), limit)
    request = ParityRequest(
        bundle=bundle,
        prompts=chosen,
        max_new_tokens=max_new_tokens,
        threads=threads,
        context_length=context_length,
        checkpoint=checkpoint or _embedded(bundle),
        stock=not no_stock,
    )
    with working("opening") as show:
        report = prove(request, show)
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


def _print(report: ParityReport, folder: Path) -> None:
    console = Console()
    console.print(_table(report))
    for result in report.results:
        for comparison in result.comparisons:
            if comparison.verdict == "different":
                runner = f"{result.runner}{', MTP' if result.num_draft_tokens else ''}"
                place = comparison.detail or f"token {comparison.first_difference}"
                _print_line(console, f"DIFFERENT: {runner}, {comparison.prompt}: {place}")
    for finding in report.findings:
        _print_line(console, f"WRONG: {finding}")
    for note in report.notes:
        _print_line(console, note)
    for reason in report.left_out:
        _print_line(console, f"left out: {reason}")
    exact = ", ".join(dict.fromkeys(result.runner for result in report.results if result.tolerance == 0))
    within = f"within {report.tolerance:g} at the first difference{f' (none allowed in {exact})' if exact else ''}"
    _print_line(
        console,
        f"{'PASSED' if report.passed else 'FAILED'}; near-tie: the two best logits {within}. "
        f"Written: {folder}/parity.json, parity.md",
    )


def _table(report: ParityReport) -> Table:
    table = Table(title=f"{report.model}, {report.recipe}: {report.max_new_tokens} tokens per prompt, greedy")
    for name in ("runtime", "MTP", "same output", "committed/round", "tok/s", "against plain"):
        table.add_column(name, justify="left" if name == "runtime" else "right")
    plain = {r.runner: r.tokens_per_second for r in report.results if r.num_draft_tokens == 0}
    for result in report.results:
        speed, base = result.tokens_per_second, plain.get(result.runner)
        table.add_row(
            result.runner,
            f"K = {result.num_draft_tokens}" if result.num_draft_tokens else "off",
            "reference" if result is report.results[0] else _same_output(result),
            "–" if result.committed_per_round is None else f"{result.committed_per_round:.2f}",
            f"{speed:.0f}" if speed else "–",
            f"{speed / base:.2f}x" if speed and base else "–",
        )
    return table


def _same_output(result: RunnerResult) -> str:
    equal, ties, different = (result.count(verdict) for verdict in ("equal", "near_tie", "different"))
    if not ties and not different:
        return "yes"
    counts = f"{equal} of {len(result.comparisons)}, {ties} near-ties"
    return f"{counts}, {different} DIFFERENT" if different else counts


def _print_line(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)
