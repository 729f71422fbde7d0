"""python -m tools.synthesize --model e2b --output FOLDER

Writes FOLDER/target and FOLDER/drafter: checkpoints of the published layout and size with seeded random weights.
"""

from __future__ import annotations

import shutil
import signal
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from mtp_export.arch import gemma4
from mtp_export.errors import OutputError
from mtp_export.staging import staged_folder
from mtp_runtime.errors import MtpError
from tools.synthesize import layout, quantised, texts
from tools.synthesize.files import write_weights
from tools.synthesize.values import Values

VARIANTS = ("plain", "qat-q4_0-unquantized", *quantised.VARIANTS)
_SPARE_BYTES = 64 << 20  # of disk, for the tokenizer and configs


def synthesize(
    model: str, output: Path, *, variant: str, depth: Fraction, seed: int, shard_bytes: int | None = None
) -> None:
    """Write a pair; the folder takes its name when it is complete.

    Raises:
        OutputError: the output exists, cannot be written, or there is not enough disk for it.
    """
    pair, qat = gemma4.PAIRS[model], variant != "plain"
    target = pair.target if depth == 1 else layout.at_depth(pair.target, depth)
    parts = {
        "target": layout.target_tensors(target, unused_caches=not qat),
        "drafter": layout.drafter_tensors(pair.drafter),
    }
    if variant in quantised.VARIANTS:
        parts["target"] = quantised.quantised(parts["target"], variant, target.per_layer_size)
    total = sum(tensor.size_bytes for tensors in parts.values() for tensor in tensors)
    with staged_folder(output, force=False) as folder:
        _check_disk(output, total + _SPARE_BYTES)
        with click.progressbar(length=total, label=f"{model}: {total / 1e9:.2f} GB", file=sys.stderr) as bar:
            for number, (part, tensors) in enumerate(parts.items()):
                (folder / part).mkdir()
                longest = max(tensor.row_length for tensor in tensors)
                values = Values(2 * seed + number, longest_row=longest, lattice=qat)
                write_weights(folder / part, tensors, values, bar.update, shard_bytes)
        texts.write_target_texts(folder / "target", target, variant)
        texts.write_drafter_texts(folder / "drafter", pair.drafter, target.max_position_embeddings)


def _check_disk(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed:
        raise OutputError(
            f"{output.absolute().parent} has {free / 1e9:.2f} GB free and the pair needs {needed / 1e9:.2f} GB: "
            "free some space, or choose another --output or a smaller --depth"
        )


def _fraction(context: click.Context, parameter: click.Parameter, value: str) -> Fraction:
    try:
        depth = Fraction(value)
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(f"{value!r} is not a fraction such as 1/8") from None
    if not 0 < depth <= 1:
        raise click.BadParameter(f"{value} is not above 0 and at most 1")
    return depth


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(sorted(gemma4.PAIRS)), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--variant", type=click.Choice(VARIANTS), default=VARIANTS[0], show_default=True)
@click.option("--depth", default="1", callback=_fraction, help="Fraction of the target's layers, such as 1/8.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--shard-gb", type=click.FloatRange(0, min_open=True), help="Save in shards with an index.")
def command(shard_gb: float | None, **options: Any) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up like Ctrl-C does
    try:
        synthesize(**options, shard_bytes=None if shard_gb is None else int(shard_gb * 1e9))
    except MtpError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    command()
