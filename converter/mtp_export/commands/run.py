"""`mtp-export run`."""

from __future__ import annotations

import sys
from typing import Any, Literal

import click

from mtp_runtime.errors import UserError


def _depth(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    return value if value in (None, "auto") else click.INT(value, parameter, context)


@click.command("run")
@click.argument("bundle", type=click.Path())
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Put the prompt into the bundle's chat template as a user's turn.")
@click.option("--no-mtp", is_flag=True, help="Decode plainly, one token a pass.")
@click.option(
    "--num-draft-tokens",
    callback=_depth,
    metavar="INTEGER|auto",
    help="Tokens drafted in a round, up to the bundle's K; auto: as many as pay, none where none do.  [K]",
)
@click.option("--max-new-tokens", type=int, default=256, show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the trace as JSON: tokens, origins, statistics.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(
    bundle: str,
    prompt: str | None,
    chat: bool,
    no_mtp: bool,
    num_draft_tokens: int | Literal["auto"] | None,
    max_new_tokens: int,
    threads: int,
    as_json: bool,
    debug: bool,
) -> None:
    """Continue PROMPT (or standard input) greedily with the reference runtime."""
    from mtp_runtime import Session

    if prompt is None:
        if sys.stdin.isatty():
            raise UserError("no prompt: give it as an argument or on standard input")
        prompt = sys.stdin.read()
    if no_mtp and num_draft_tokens:
        raise UserError("--no-mtp and --num-draft-tokens contradict each other: give one")
    with Session.open(bundle, threads=threads) as session:
        text = session.chat_prompt(prompt) if chat else prompt
        generation = session.generate(
            text, max_new_tokens=max_new_tokens, num_draft_tokens=0 if no_mtp else num_draft_tokens
        )
        if as_json:
            trace = generation.finish()
            click.echo(trace.to_json(), nl=False)
            return
        stream = session.text_stream()
        for token in generation:
            click.echo(stream.push(token.id), nl=False)
        click.echo(stream.finish())
        click.echo(_summary(generation.stats), err=True)


def _summary(stats: Any) -> str:
    summary = stats.summary()
    return ", ".join(
        f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in summary.items()
    )
