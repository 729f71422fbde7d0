"""`mtp-export adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mtp_export.cli.options import check_torch_device
from mtp_export.cli.output import working
from mtp_runtime.errors import UserError


@click.command("adapt")
@click.option("--model", default="nano", show_default=True, help="nano (embedded), e2b or e4b.")
@click.option("--checkpoint", metavar="DIR|ID", help="The fine-tuned target.  [model's own]")
@click.option("--drafter", metavar="DIR|ID", help="The drafter to start from.  [model's own]")
@click.option(
    "--adapter", "adapters", metavar="DIR", multiple=True, type=click.Path(path_type=Path), help="LoRA to be merged."
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    required=True,
    help="JSONL with a text, or messages and tools, per line: what the target will be asked.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write the drafter to.")
@click.option("--steps", type=click.IntRange(1), default=400, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Answers a step.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(8), default=128, show_default=True, help="Of each answer.")
@click.option("--drafter-position-offset", type=click.IntRange(0, 1), default=1, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--resume", is_flag=True, help="Go on where a killed run of the same output was.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
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
    """Adapt a drafter to a fine-tuned target, on the target's own answers to prompts.

    What the target says stays as it is, whatever the drafter; more drafts are accepted. Writes a drafter's checkpoint,
    which `export --drafter` and transformers take.
    """
    check_torch_device(device)
    if output.exists():
        raise UserError(f"{output} exists already: choose another --output")
    with working("loading") as tell:
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
            tell(f"step {step.number} of {options['steps']}, {share:.0%} of first drafts are the target's choice")

        adapt(
            pair,
            calibration_texts(pair.target, pair.target_spec, read_prompts(prompts)),
            output,
            Adaptation(**options, position_offset=drafter_position_offset, device=device),
            resume=resume,
            watch=Watch(on_stage=tell, on_step=on_step),
        )
    name = click.format_filename(output)
    click.echo(f"{name}: a drafter for this target; next: mtp-export export --drafter {name} with its --checkpoint")
