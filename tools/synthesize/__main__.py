"""python -m tools.synthesize --model e2b --output FOLDER

Writes FOLDER/target and FOLDER/drafter: checkpoints of the published layout and size with seeded random weights.
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from mtp_export.arch import published
from mtp_export.arch.spec import PairSpec, TargetSpec
from mtp_export.bundle.staging import staged_folder
from mtp_export.errors import OutputError
from mtp_runtime.errors import MtpError, UserError
from tools.synthesize import finetune, layout, quantised, texts, towers
from tools.synthesize.files import write_file, write_weights
from tools.synthesize.layout import StoredTensor
from tools.synthesize.values import Values

VARIANTS = ("plain", "qat-q4_0-unquantized", *quantised.VARIANTS)
TARGET, DRAFTER, ADAPTER = "target", "drafter", "adapter"
_SPARE_BYTES = 64 << 20  # of disk, for the tokenizer and configs
_RANK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extras:
    """What not every pair has: `leftovers` names the tool that tuned the target and left its keys in config.json; with
    `adapter_rank` there is a LoRA adapter beside the pair; `shard_bytes` is the most that a file of weights holds."""

    towers: bool = False
    leftovers: str | None = None
    adapter_rank: int | None = None
    shard_bytes: int | None = None


_NO_EXTRAS = Extras()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """A pair before it is written; `tensors` by the folder they go to."""

    pair: PairSpec
    target: TargetSpec
    towers: towers.Towers | None
    variant: str
    extras: Extras
    tensors: Mapping[str, list[StoredTensor]]


def synthesize(
    model: str, output: Path, *, variant: str, depth: Fraction, seed: int, extras: Extras = _NO_EXTRAS
) -> None:
    """Write a pair; the folder takes its name when it is complete.

    Raises:
        OutputError: the output exists, cannot be written, or there is not enough disk for it.
        UserError: it is not known how this variant stores towers.
    """
    plan = _plan(published.PAIRS[model], variant, depth, extras)
    total = sum(tensor.size_bytes for tensors in plan.tensors.values() for tensor in tensors)
    with staged_folder(output, force=False) as folder:
        _check_disk(output, total + _SPARE_BYTES)
        with click.progressbar(length=total, label=f"{model}: {total / 1e9:.2f} GB", file=sys.stderr) as bar:
            for number, part in enumerate(plan.tensors):
                (folder / part).mkdir()
                _write_tensors(folder / part, plan, 2 * seed + number, bar.update)
        _write_texts(folder, plan)


def _plan(pair: PairSpec, variant: str, depth: Fraction, extras: Extras) -> _Plan:
    if extras.towers and variant == quantised.MOBILE:
        raise UserError(f"how {variant} stores its towers is not known: leave --towers out, or take another --variant")
    target = pair.target if depth == 1 else layout.at_depth(pair.target, depth)
    beside = towers.at_depth(towers.of(pair.name), depth) if extras.towers else None
    of_towers = [] if beside is None else towers.tensors_of(beside, target.hidden_size)
    floats = layout.target_tensors(target, unused_caches=variant == VARIANTS[0])
    stored = floats
    if variant in quantised.VARIANTS:
        stored = quantised.quantised(floats, variant, target.per_layer_size)
    tensors = {TARGET: stored + of_towers, DRAFTER: layout.drafter_tensors(pair.drafter)}
    if extras.adapter_rank is not None:
        used = layout.target_tensors(target, unused_caches=False)
        tensors[ADAPTER] = finetune.adapter_tensors(used + of_towers, extras.adapter_rank)
    return _Plan(pair=pair, target=target, towers=beside, variant=variant, extras=extras, tensors=tensors)


def _write_tensors(folder: Path, plan: _Plan, seed: int, on_bytes: Callable[[int], None]) -> None:
    tensors = plan.tensors[folder.name]
    longest = max(tensor.row_length for tensor in tensors)
    adapter = folder.name == ADAPTER
    values = Values(seed, longest_row=longest, lattice=plan.variant != VARIANTS[0] and not adapter)
    if adapter:
        write_file(folder / "adapter_model.safetensors", tensors, values, on_bytes)
    else:
        write_weights(folder, tensors, values, on_bytes, plan.extras.shard_bytes)


def _write_texts(folder: Path, plan: _Plan) -> None:
    pair, extras = plan.pair, plan.extras
    leftovers = {} if extras.leftovers is None else finetune.leftovers(pair)
    texts.write_target_texts(folder / TARGET, plan.target, plan.variant, plan.towers, leftovers)
    positions = plan.target.max_position_embeddings
    config = texts.drafter_config(pair.drafter, positions)
    if extras.towers:
        config = texts.published_drafter_config(pair.drafter, positions, qat=plan.variant != VARIANTS[0])
    texts.write_json(folder / DRAFTER / "config.json", config)
    if extras.adapter_rank is not None:
        texts.write_json(folder / ADAPTER / "adapter_config.json", finetune.adapter_config(pair, extras.adapter_rank))


def _check_disk(output: Path, needed: int) -> None:
    place = output.absolute().parent
    if (free := shutil.disk_usage(place).free) < needed:
        sizes = f"{place} has {free / 1e9:.2f} GB free and the pair needs {needed / 1e9:.2f} GB"
        raise OutputError(f"{sizes}: free some space, or choose another --output or a smaller --depth")


def _fraction(context: click.Context, parameter: click.Parameter, value: str) -> Fraction:
    try:
        depth = Fraction(value)
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(f"{value!r} is not a fraction such as 1/8") from None
    if not 0 < depth <= 1:
        raise click.BadParameter(f"{value} is not above 0 and at most 1")
    return depth


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(sorted(published.PAIRS)), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--variant", type=click.Choice(VARIANTS), default=VARIANTS[0], show_default=True)
@click.option("--depth", default="1", callback=_fraction, help="Fraction of the layers of target and towers, as 1/8.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--towers", is_flag=True, help="Vision and audio too, and the whole published configs.")
@click.option("--leftovers", type=click.Choice(finetune.LEFTOVERS), help="Keys that this tool adds to config.json.")
@click.option("--adapter", is_flag=True, help="A LoRA adapter in FOLDER/adapter, of text and, with towers, vision.")
@click.option("--rank", type=click.IntRange(1), default=_RANK, show_default=True, help="Of the adapter.")
@click.option("--shard-gb", type=click.FloatRange(0, min_open=True), help="Save in shards with an index.")
def command(*, shard_gb: float | None, adapter: bool, rank: int, towers: bool, leftovers: str, **pair: Any) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up like Ctrl-C does
    extras = Extras(
        towers=towers,
        leftovers=leftovers,
        adapter_rank=rank if adapter else None,
        shard_bytes=None if shard_gb is None else int(shard_gb * 1e9),
    )
    try:
        synthesize(**pair, extras=extras)
    except MtpError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    command()
