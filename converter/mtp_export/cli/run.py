"""`mtp-export run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from mtp_export.cli.options import (
    bundle_argument,
    context_length_option,
    debug_option,
    json_option,
    max_new_tokens_option,
    threads_option,
)
from mtp_runtime.errors import UserError


def _num_drafts(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    return value if value in (None, "auto") else click.INT(value, parameter, context)


@click.command("run")
@bundle_argument
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message, through the bundle's chat template.")
@click.option(
    "--tools",
    type=click.Path(),
    metavar="FILE",
    help="With --chat: functions that the model may call, a JSON list of declarations as in OpenAI's API.",
)
@click.option("--no-mtp", is_flag=True, help="Decode without drafts, one token in each pass.")
@click.option(
    "--num-draft-tokens",
    callback=_num_drafts,
    metavar="INTEGER|auto",
    help="Tokens drafted in a round, at most the bundle's K. auto measures which number is fastest.  [K]",
)
@max_new_tokens_option(256, help_text="Longest output, in tokens.")
@click.option(
    "--sampling",
    type=click.Choice(("checkpoint",)),
    help="Sample as the checkpoint's generation_config.json says; greedy if it does not sample.",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy; above 0 it samples.")
@click.option("--top-k", type=int, help="Sample from the k most likely tokens only.")
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    help="Sample from the most likely tokens, up to this probability.  [1]",
)
@click.option("--seed", type=int, default=0, help="The same seed gives the same tokens.  [0]")
@click.option(
    "--sampling-method",
    "method",
    type=click.Choice(("match", "speculative")),
    default="match",
    help="How a sampled draft is accepted: match, if the target samples the same token; speculative, by the ratio of "
    "probabilities.  [match]",
)
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    help="Above 1, tokens of the text become less likely.  [1]",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before TEXT. May be repeated.")
@threads_option(2)
@click.option(
    "--provider",
    type=click.Choice(("cpu", "webgpu")),
    default="cpu",
    help="ONNX: where the graphs run. webgpu is a GPU and needs mtp-export[webgpu].  [cpu]",
)
@context_length_option
@json_option("tokens, origins and statistics")
@debug_option
@click.pass_context
def command(
    context: click.Context,
    /,
    bundle: Path,
    prompt: str | None,
    chat: bool,
    tools: str | None,
    no_mtp: bool,
    num_draft_tokens: int | Literal["auto"] | None,
    max_new_tokens: int,
    sampling: Literal["checkpoint"] | None,
    stop: tuple[str, ...],
    threads: int,
    provider: Literal["cpu", "webgpu"],
    context_length: int | None,
    as_json: bool,
    debug: bool,
    **drawing: Any,
) -> None:
    """Continue PROMPT, or standard input, with the reference runtime.

    Decoding is greedy unless --temperature or --sampling is given.
    """
    from mtp_runtime import Sampling, Session
    from mtp_runtime.text.stop_strings import check_stop_strings

    # Mistakes are reported before standard input is read and the bundle is opened, which may take long.
    if no_mtp and num_draft_tokens:
        raise UserError("--no-mtp and --num-draft-tokens contradict each other: give one")
    if tools is not None and not chat:
        raise UserError("--tools is for the chat template: give --chat too")
    tool_list = None if tools is None else _declarations(Path(tools))
    chosen = Sampling(**drawing)
    if sampling is not None:
        _check_nothing_is_stated(context, sampling)
    elif chosen.temperature == 0.0:
        _check_nothing_is_for_drawing(context)
    check_stop_strings(stop)
    if prompt is None:
        if sys.stdin.isatty():
            raise UserError("no prompt: give it as an argument or on standard input")
        prompt = sys.stdin.read()
    with Session.open(bundle, threads=threads, provider=provider, context_length=context_length) as session:
        if sampling is not None:
            chosen = session.checkpoint_sampling(seed=chosen.seed, method=chosen.method)
        text = session.chat_prompt(prompt, tools=tool_list) if chat else prompt
        generation = session.generate(
            text,
            max_new_tokens=max_new_tokens,
            num_draft_tokens=0 if no_mtp else num_draft_tokens,
            stop=stop,
            sampling=chosen,
        )
        if as_json:
            click.echo(generation.finish().to_json(), nl=False)
            return
        for _, piece in generation.with_text():
            click.echo(piece, nl=False)
        click.echo()
        click.echo(_summary(generation.stats), err=True)


def _declarations(path: Path) -> list[dict[str, Any]]:
    """Return the functions of a file; each has at least a name.

    Raises:
        UserError: the file cannot be read or declares something else.
    """
    try:
        declared: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the tools of {path}: {error}") from error
    example = '[{"type": "function", "function": {"name": "add", "parameters": {…}}}]'
    if not isinstance(declared, list) or not declared:
        raise UserError(f"{path} declares no functions: expected a list such as {example}")
    for number, tool in enumerate(declared, 1):
        function = tool.get("function") if isinstance(tool, dict) else None
        function = function if isinstance(function, dict) else {}
        if not isinstance(function.get("name"), str) or not isinstance(function.get("parameters", {}), dict):
            raise UserError(f"entry {number} of {path} declares no function: expected a list such as {example}")
    return declared


def _given_option(context: click.Context, name: str) -> str | None:
    """Return the option of a parameter that the command line sets; None if it does not."""
    if context.get_parameter_source(name) is ParameterSource.DEFAULT:
        return None
    return next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)


def _check_nothing_is_for_drawing(context: click.Context) -> None:
    for name in ("top_k", "top_p", "seed", "method"):
        if option := _given_option(context, name):
            raise UserError(f"{option} is for tokens that are drawn: give a --temperature above 0 too")


def _check_nothing_is_stated(context: click.Context, sampling: str) -> None:
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        if option := _given_option(context, name):
            raise UserError(f"--sampling {sampling} and {option} contradict each other: give one")


def _summary(stats: Any) -> str:
    summary = stats.summary()
    return ", ".join(
        f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in summary.items()
    )
