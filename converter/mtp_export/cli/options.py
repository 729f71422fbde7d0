"""Options and arguments that commands share, and the checks of them.

Nothing heavy is imported here: `--help` reads this module, and a mistake is reported before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from mtp_export.arch.published import PAIRS
from mtp_export.arch.spec import PairSpec
from mtp_runtime.errors import UserError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# The pair that the package holds: it has no id on the hub.
EMBEDDED_MODEL = next(pair.name for pair in PAIRS.values() if not pair.target_id)
MODEL_NAMES = ", ".join(f"{name} (in the package)" if name == EMBEDDED_MODEL else name for name in PAIRS)


def by_model(value: Callable[[PairSpec], object]) -> str:
    """Return the value of every published pair as text: `nano 1024, e2b and e4b 4096`."""
    names: dict[object, list[str]] = {}
    for pair in PAIRS.values():
        names.setdefault(value(pair), []).append(pair.name)
    return ", ".join(f"{' and '.join(pairs)} {number}" for number, pairs in names.items())


def combined(*decorators: Decorator) -> Decorator:
    """Return one decorator that adds all of these options, in the order of the help page."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
debug_option = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
model_option = click.option("--model", default=EMBEDDED_MODEL, show_default=True, help=f"One of: {MODEL_NAMES}.")
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random numbers.")
drafter_position_offset_option = click.option(
    "--drafter-position-offset",
    type=click.IntRange(0, 1),
    default=1,
    show_default=True,
    help="Position of the drafter: 1 as in transformers, 0 as in vLLM.",
)
adapter_option = click.option(
    "--adapter",
    "adapters",
    metavar="DIR",
    multiple=True,
    type=click.Path(path_type=Path),
    help="LoRA adapter of the target, as PEFT saves it. It is merged. Several add up.",
)


def json_option(content: str) -> Decorator:
    """Return `--json`; `content` is what is printed."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {content} as JSON, and nothing else.")


def checkpoint_options(target: str, drafter: str) -> Decorator:
    """Return `--checkpoint` and `--drafter`, each a folder or a Hugging Face id, with their help texts."""
    return combined(
        click.option("--checkpoint", metavar="DIR|ID", help=f"{target}  [the model's published one]"),
        click.option("--drafter", metavar="DIR|ID", help=f"{drafter}  [the model's published one]"),
    )


def threads_option(default: int) -> Decorator:
    """Return `--threads`."""
    return click.option(
        "--threads", type=int, default=default, show_default=True, help="Processor threads of the runtime."
    )


def count_option(name: str, default: int, help_text: str, *, least: int = 1, most: int | None = None) -> Decorator:
    """Return the option `name`, a whole number from `least` to `most`."""
    return click.option(name, type=click.IntRange(least, most), default=default, show_default=True, help=help_text)


def prompts_option(help_text: str, *, required: bool = False) -> Decorator:
    """Return `--prompts`, a JSONL file."""
    return click.option("--prompts", type=click.Path(path_type=Path), required=required, help=help_text)


def limit_option(default: int | None) -> Decorator:
    """Return `--limit`, the number of prompts to use; None stands for all."""
    return click.option(
        "--limit",
        type=int,
        default=default,
        show_default=default is not None,
        help="Use this many prompts, taken from all kinds in turn.",
    )


def max_new_tokens_option(default: int, *, least: int | None = None, help_text: str) -> Decorator:
    """Return `--max-new-tokens`; `least` is the smallest number that is taken, None to let the command check."""
    kind = click.INT if least is None else click.IntRange(least)
    return click.option("--max-new-tokens", type=kind, default=default, show_default=True, help=help_text)


context_length_option = click.option(
    "--context-length",
    type=int,
    help="Context to open the bundle at, in tokens: at most its longest.  [the bundle's default]",
)


def over_prompts(
    prompts: str, *, limit: int | None, max_new_tokens: int, threads: int, output: str = "output"
) -> Decorator:
    """Return the options of a command that runs a bundle over prompts: with these defaults, `prompts` as the help text
    of `--prompts`, and `output` as the word for what the model writes."""
    return combined(
        prompts_option(prompts),
        limit_option(limit),
        max_new_tokens_option(max_new_tokens, help_text=f"Longest {output}, in tokens."),
        threads_option(threads),
    )


def output_option(help_text: str, *, required: bool = False) -> Decorator:
    """Return `--output`."""
    return click.option("--output", type=click.Path(path_type=Path), required=required, help=help_text)


torch_device_option = click.option(
    "--device", default="cpu", show_default=True, help="Where the models are computed: cpu or cuda."
)


def check_bundle_options(bundle: Path, counts: Mapping[str, int]) -> None:
    """Check that `bundle` is a folder and that each count, by its option, is at least 1.

    Raises:
        UserError: with the value and what to give.
    """
    for option, value in counts.items():
        if value < 1:
            raise UserError(f"{option} is {value}: give 1 or more")
    if not bundle.is_dir():
        raise UserError(f"{bundle} is no folder: give the folder that mtp-export wrote")


def check_torch_device(name: str) -> None:
    """Check that torch can compute on `cpu` or `cuda`, whichever is named.

    Raises:
        UserError: with the value and what to give.
    """
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}, expected cpu or cuda")
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda, and torch finds none here: install its CUDA build, or take --device cpu")
