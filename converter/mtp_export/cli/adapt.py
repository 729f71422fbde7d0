"""`mtp-export adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mtp_export.cli.options import (
    adapter_option,
    check_torch_device,
    checkpoint_options,
    count_option,
    debug_option,
    drafter_position_offset_option,
    max_new_tokens_option,
    model_option,
    output_option,
    prompts_option,
    seed_option,
    torch_device_option,
)
from mtp_export.cli.output import working
from mtp_runtime.errors import UserError


@click.command("adapt")
@model_option
@checkpoint_options("The fine-tuned target: a folder or Hugging Face id.", "The drafter to start from.")
@adapter_option
@prompts_option(
    "JSONL: a text, or messages and tools, in each line. Use prompts like those that the target will get.",
    required=True,
)
@output_option("Folder to write the drafter to.", required=True)
@count_option("--steps", 400, "Steps of training.")
@count_option("--batch", 8, "Answers in a step.")
@click.option(
    "--learning-rate", type=float, default=1e-3, show_default=True, help="Highest learning rate of the training."
)
@max_new_tokens_option(128, least=8, help_text="Longest answer of the target.")
@drafter_position_offset_option
@seed_option
@torch_device_option
@click.option("--resume", is_flag=True, help="Continue a run that was killed. The output must be the same.")
@debug_option
def command(
    model: str,
    checkpoint: str | None,
    drafter: str | None,
    adapters: tuple[Path, ...],
    prompts: Path,
    output: Path,
    device: str,
    resume: bool,
    debug: bool,
    drafter_position_offset: int,
    **options: Any,
) -> None:
    """Train a drafter for a fine-tuned target.

    It learns from the target's own answers to prompts. The target accepts more drafts of the new drafter. Its output
    stays the same: it never depends on the drafter. The result is a drafter checkpoint, which `export --drafter` and
    transformers read.
    """
    check_torch_device(device)
    if output.exists():
        raise UserError(f"{output} exists already: choose another --output")
    with working("loading") as show:
        from mtp_calibration.choose.calibration_texts import calibration_texts
        from mtp_calibration.drafter.adapt import Adaptation, Watch, adapt
        from mtp_export.check.prompts import read_prompts
        from mtp_export.source.pair import open_made_from

        pair = open_made_from(model, checkpoint, drafter, adapters)
        shares: list[float] = []

        def on_step(step: Any) -> None:
            shares.append(step.agreement)
            recent = shares[-20:]
            share = sum(recent) / len(recent)
            show(f"step {step.number} of {options['steps']}, {share:.0%} of first drafts are the target's choice")

        adapt(
            pair,
            calibration_texts(pair.target, pair.target_spec, read_prompts(prompts)),
            output,
            Adaptation(**options, position_offset=drafter_position_offset, device=device),
            resume=resume,
            watch=Watch(on_stage=show, on_step=on_step),
        )
    name = click.format_filename(output)
    click.echo(f"{name}: a drafter for this target; next: mtp-export export --drafter {name} with its --checkpoint")
