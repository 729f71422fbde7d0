"""`mtp-export bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from mtp_export.cli.options import (
    bundle_argument,
    context_length_option,
    count_option,
    debug_option,
    json_option,
    output_option,
)
from mtp_export.cli.output import number_table, working
from mtp_runtime.atomic import write_atomically
from mtp_runtime.errors import UserError

if TYPE_CHECKING:
    from mtp_export.check.bench import BenchReport


@click.command("bench")
@bundle_argument
@count_option("--threads", 2, "Processor threads of the runtime.", most=256)
@count_option("--filled", 500, "Positions of the cache that are filled.")
@count_option("--new-tokens", 48, "Tokens that rounds generate at a time.", least=8)
@count_option("--repeats", 20, "How often each pass is timed.", least=3)
@context_length_option
@output_option("Draw time against acceptance to this SVG file.")
@json_option("the figures")
@debug_option
def command(
    bundle: Path,
    threads: int,
    filled: int,
    new_tokens: int,
    repeats: int,
    context_length: int | None,
    output: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Time a bundle's passes and rounds with the reference runtime: prefill, decode, verify of every size, draft, head.

    Rounds are timed at imposed acceptances, since the text decides the real one: a draft is the target's own next token
    with that probability. A last line warns if drafts changed the output: `parity` tells a near-tie from an error.
    """
    import msgspec

    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"cannot write {output}: no folder {output.parent}: choose another --output")
    with working("loading") as show:
        from mtp_export.check.bench import BenchRequest, bench

        request = BenchRequest(
            bundle=bundle,
            threads=threads,
            filled=filled,
            new_tokens=new_tokens,
            repeats=repeats,
            context_length=context_length,
        )
        report = bench(request, show)
    if output is not None:
        _write_drawing(report, output)
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        _print(report)


def _write_drawing(report: BenchReport, output: Path) -> None:
    from mtp_export.check.chart import draw

    try:
        write_atomically(output, draw(report))
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}: choose another --output") from error


def _print(report: BenchReport) -> None:
    console = Console()
    title = f"{report.model}, {report.recipe} (drafter {report.drafter_recipe}), {report.backend}, {report.machine}"
    table = number_table(title, "pass", "threads", "filled", "ms", "10–90 %", "tok/s")
    for name, timing in report.passes.items():
        filled = "–" if name == "head" or name.startswith("prefill") else str(report.filled)
        spread = f"{timing.low_ms:.3f}–{timing.high_ms:.3f}"
        speed = "–" if name in ("draft", "head") else f"{timing.tokens_per_second:.1f}"
        table.add_row(name, str(report.threads), filled, f"{timing.median_ms:.3f}", spread, speed)
    console.print(table)
    table = number_table(None, "rounds", "acceptance", "committed/round", "ms/token", "tok/s", "against plain")
    plain = report.rounds[0].ms_per_token
    for rounds in report.rounds:
        label = "none" if rounds.alpha is None else f"K = {rounds.num_draft_tokens}"
        alpha = "–" if rounds.alpha is None else f"{rounds.alpha:g}"
        per_second, gain = 1000 / rounds.ms_per_token, plain / rounds.ms_per_token
        committed = f"{rounds.committed_per_round:.2f}"
        table.add_row(label, alpha, committed, f"{rounds.ms_per_token:.3f}", f"{per_second:.1f}", f"{gain:.2f}x")
    console.print(table)
    for k, even in report.break_even.items():
        gain_from = "pay at no acceptance" if even is None else f"pay from an acceptance of {even:.2f} per position"
        console.print(f"rounds of K = {k} {gain_from}")
    if not all(rounds.same_output for rounds in report.rounds):
        console.print("drafts changed the output, so some were imposed wrongly: run mtp-export parity to see where")
