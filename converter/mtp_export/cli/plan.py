"""`mtp-export plan`."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import click

from mtp_export.cli.exit_codes import FAILED
from mtp_export.cli.export import config_of, export_options, recipe_list
from mtp_export.cli.options import debug_option, json_option
from mtp_export.cli.output import context_text, print_notes, working
from mtp_export.config import ExportConfig


@click.command("plan", epilog=recipe_list())
@export_options
@json_option("the plan")
@debug_option
def command(as_json: bool, debug: bool, **options: Any) -> None:
    """Print what `export` would write and need.

    The options are the same. Nothing is written and no weight is read. Of a published checkpoint only config.json and
    the headers of the weights are downloaded. Sizes are exact to 1 %; memory and time are estimates. The exit code is 1
    if the bundle does not fit on the disk.
    """
    show_plan(config_of(options), as_json=as_json)


def show_plan(config: ExportConfig, *, as_json: bool) -> None:
    """Print the plan of an export, and end with exit code 1 if a disk is too small."""
    with working("planning"):
        from mtp_export.plan import plan

        result = plan(config)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result) | {"fits": not result.remedy, "remedy": result.remedy}))
    else:
        _print(result)
        print_notes(result.notes)
    if result.remedy:
        click.echo(f"mtp-export: error: {result.remedy}", err=True)
        sys.exit(FAILED)


def _print(plan: Any) -> None:
    title = f"{click.format_filename(plan.output)}: {plan.model} as {plan.export_format}, {plan.recipe}"
    click.echo(f"{title} (drafter {plan.drafter_recipe}); the pair fits together")
    for name, size in plan.files_bytes.items():
        click.echo(f"  {name:28} {_size(size):>10}  {_use(plan, name)}".rstrip())
    click.echo(f"  {'together':28} {_size(sum(plan.files_bytes.values())):>10}")
    if plan.left_aside:
        click.echo(f"left aside: {', '.join(plan.left_aside)}")
    download = f", of which {_size(plan.download_bytes)} are to be downloaded" if plan.download_bytes else ""
    click.echo(f"to export: reads {_size(plan.input_bytes)}{download}")
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in plan.seconds.items())
    click.echo(
        f"  about {sum(plan.seconds.values()):.0f} s ({stages}) and {plan.memory_bytes / 2**30:.1f} GiB of memory with "
        f"{plan.workers} {'worker' if plan.workers == 1 else 'workers'}"
    )
    for disk in plan.disks:
        click.echo(f"  {_size(disk.needed_bytes)} of disk in {disk.folder}, where {_size(disk.free_bytes)} are free")
    device = plan.device
    click.echo(f"to run: {context_text(plan)}, up to {plan.num_draft_tokens} drafts a round")
    parts = {
        "weights": device.weights_bytes,
        "KV cache when full": device.kv_cache_bytes,
        "logits": device.logits_bytes,
    }
    listed = ", ".join(f"{_size(count)} {name}" for name, count in parts.items())
    click.echo(f"  {_size(device.memory_bytes)} of memory: {listed}")
    if plan.longest_context_length:
        for length, count in device.kv_cache_bytes_by_context.items():
            click.echo(f"  context {length:6}: {_size(count):>9} KV cache")
    click.echo(f"  {_size(device.table_bytes)} of tables stay on the disk, mapped: a token reads one row of each")


def _use(plan: Any, name: str) -> str:
    """Return the runtime and the signatures of a graph's file."""
    role = name.partition(".")[0]
    if role not in plan.signatures or name.endswith(".data"):
        return ""
    return f"{plan.backend}: {', '.join(plan.signatures[role])}"


def _size(count: int) -> str:
    """Return a number of bytes as MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
