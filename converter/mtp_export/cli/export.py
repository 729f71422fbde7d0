"""`mtp-export export`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mtp_export.bundle.staging import check_output
from mtp_export.cli.output import print_notes
from mtp_export.config import (
    ExportConfig,
    FormatConfig,
    GraphConfig,
    QuantisationConfig,
    RefinementConfig,
    SourceConfig,
)
from mtp_export.weights.recipes import RECIPES
from mtp_runtime.errors import UserError

if TYPE_CHECKING:
    from mtp_export.refinement import Refinement


def export_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what to export; `config_of` takes them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = (
    click.option("--model", default="nano", show_default=True, help="nano (embedded), e2b or e4b."),
    click.option(
        "--target", "export_format", default="tflite", show_default=True, help="Export format: tflite or onnx."
    ),
    click.option(
        "--checkpoint", metavar="DIR|ID", help="Target checkpoint: a folder or Hugging Face id.  [model's own]"
    ),
    click.option(
        "--adapter",
        "adapters",
        metavar="DIR",
        multiple=True,
        type=click.Path(path_type=Path),
        help="LoRA adapter of the target, as PEFT saves it, to be merged; several add up.",
    ),
    click.option(
        "--chat-template",
        type=click.Path(path_type=Path),
        help="Jinja file in place of the checkpoint's chat template.  [its own]",
    ),
    click.option("--drafter", metavar="DIR|ID", help="Drafter checkpoint, likewise.  [model's own]"),
    click.option(
        "--recipe", default="int8", show_default=True, help=f"Quantisation of the target: {', '.join(RECIPES)}."
    ),
    click.option("--drafter-recipe", help="Quantisation of the drafter.  [f32 with f32, else int8]"),
    click.option(
        "--rounding",
        default="nearest",
        show_default=True,
        help="Of the target's matrices: nearest, or gptq, which keeps what they give on --prompts.",
    ),
    click.option(
        "--max-size", help="Of what ships, as 2.4GB: fewer bits than the recipe's where --prompts suffer least."
    ),
    click.option("--prompts", type=click.Path(path_type=Path), help="JSONL, as for calibrate.  [55 of the package]"),
    click.option("--embedder-recipe", help="Quantisation of the look-up tables of token embeddings.  [the target's]"),
    click.option("--cache-length", type=int, help="Slots of the KV cache.  [nano 1024, e2b and e4b 4096]"),
    click.option(
        "--num-draft-tokens",
        type=int,
        help="Most tokens drafted in a round, K.  [e2b and e4b 3, nano 4]",
    ),
    click.option(
        "--drafter-position-offset",
        default="1",
        show_default=True,
        help="Position convention of the drafter: 1 transformers', 0 vLLM's, auto the better on --prompts. Changes "
        "acceptance only.",
    ),
    click.option(
        "--centroid-top-k",
        help="Clusters that the drafter's head scores; auto: as few as keep its drafts on --prompts.  [its own]",
    ),
    click.option(
        "--delegate",
        default="cpu",
        show_default=True,
        help="TFLite: gpu for a bundle that a GPU takes too; slower on the CPU.",
    ),
    click.option(
        "--composites",
        is_flag=True,
        help="With --delegate gpu: norms as LiteRT-LM's own operator; faster, and MTP less alike plain output.",
    ),
    click.option("--portable", is_flag=True, help="ONNX: standard operations only; slower with long caches."),
    click.option(
        "--batch-size", type=int, default=1, show_default=True, help="ONNX: also graphs for so many sequences at once."
    ),
    click.option("--gate", is_flag=True, help="Keep the bundle only if `calibrate` finds it to be the same model."),
    click.option("--output", type=click.Path(path_type=Path), help="Folder to write.  [./<model>-<target>]"),
    click.option("--force", is_flag=True, help="Replace an existing bundle."),
    click.option("--workers", type=int, help="Conversion processes.  [number of CPUs, at most 4]"),
)


# What may be auto, and what it is where nothing else is clearly better.
_MEASURED = {"drafter_position_offset": "1", "centroid_top_k": None}


def config_of(options: Mapping[str, Any]) -> ExportConfig:
    """Return the config of a command line, checked before torch is imported, which takes seconds.

    Raises:
        UserError: one is mistaken, or the output is taken.
    """
    automatic = tuple(name for name in _MEASURED if options[name] == "auto")
    texts = {name: default if name in automatic else options[name] for name, default in _MEASURED.items()}
    counts: dict[str, Any] = {name: _count(name, text) for name, text in texts.items()}
    size, workers, name = options["max_size"], options["workers"], options["export_format"]
    config = ExportConfig(
        source=SourceConfig(
            target=options["checkpoint"], **_some(options, "model", "drafter", "adapters", "chat_template")
        ),
        format=FormatConfig(name=name, **_some(options, "delegate", "composites", "portable", "batch_size")),
        quantisation=QuantisationConfig(**_some(options, "recipe", "drafter_recipe", "embedder_recipe")),
        graph=GraphConfig(**counts, **_some(options, "cache_length", "num_draft_tokens")),
        refinement=RefinementConfig(
            measured=automatic,
            max_size_bytes=None if size is None else _bytes(size),
            **_some(options, "prompts", "rounding", "gate"),
        ),
        output=options["output"] or Path(f"{options['model']}-{name}"),
        force=options["force"],
        workers=min(len(os.sched_getaffinity(0)), 4) if workers is None else workers,
    )
    config.check()
    check_output(config.output, force=config.force)
    return config


def _some(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names}


def refinement_of(config: RefinementConfig) -> Refinement:
    """Return what measures for an export; nothing does where nothing is left open."""
    from mtp_export.refinement import AsConfigured

    if not (config.needs_prompts or config.gate):
        return AsConfigured()
    from mtp_calibration.choose.refinement import MeasuredRefinement

    return MeasuredRefinement(config)


def _count(name: str, text: str | None) -> int | None:
    if text is not None and not text.isdecimal():
        raise UserError(f"--{name.replace('_', '-')} is {text!r}, expected a number or auto")
    return None if text is None else int(text)


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)", size)
    if found is None:
        raise UserError(f"--max-size is {size!r}, expected a number with MB, GB, MiB or GiB, as 2.4GB")
    return int(float(found[1]) * {"MB": 1e6, "GB": 1e9, "MiB": 1 << 20, "GiB": 1 << 30}[found[2]])


@click.command("export")
@export_options
@click.option("--dry-run", is_flag=True, help="Only say what would be written and needed, as `plan` does.")
@click.option("--resume", is_flag=True, help="Go on where a killed export of the same output was.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(dry_run: bool, resume: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Write a bundle: target, drafter and embedders as TFLite files and in one .litertlm, or as ONNX files."""
    config = config_of(options)
    if dry_run:
        from mtp_export.cli.plan import show_plan

        show_plan(config, as_json=as_json)
        return
    with _Bars() as bars:
        bars.start("loading", 0)
        from mtp_export.export import export

        result = export(config, bars, refinement_of(config.refinement), resume=resume)
    left = _left_to_cpu(config) if config.format.delegate == "gpu" else {}
    if as_json:
        click.echo(json.dumps(_as_json(result) | {"left_to_cpu": left}))
        return
    _print(result)
    print_notes(result.notes)
    if left:
        names = ", ".join(
            f"{count} {name} of the {role}" for role, counts in left.items() for name, count in counts.items()
        )
        output = click.format_filename(config.output)
        print_notes([f"a GPU does not take {names}: see `mtp-export inspect {output}`"])


def _left_to_cpu(config: ExportConfig) -> dict[str, dict[str, int]]:
    """Return the operators that keep a bundle from a GPU, by graph and name."""
    from mtp_export.formats.tflite.gpu_table import delegate_table, inspect_bundle

    left: dict[str, dict[str, int]] = {}
    for role, refused in inspect_bundle(config.output, delegate_table("gpu")).items():
        for refusal in refused:
            name, count = refusal.form.partition("(")[0], sum(refusal.signatures.values())
            left.setdefault(role, {})[name] = left.get(role, {}).get(name, 0) + count
    return left


class _Bars:
    """Progress on standard error, a bar a stage; nothing where that is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description:>20}"),
            BarColumn(bar_width=10),  # a line is to fit 80 columns
            TaskProgressColumn(),
            TextColumn("{task.fields[done]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._open("", 0)

    def __enter__(self) -> _Bars:
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bars.stop()

    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None:
        self.bars.update(self.task, completed=self.bars.tasks[self.task].total)
        self._open(stage, total, of_bytes=of_bytes)

    def _open(self, stage: str, total: int, *, of_bytes: bool = False) -> None:
        self.task = self.bars.add_task(stage, total=total or None, visible=bool(stage), done="")
        self.of_bytes, self.names = of_bytes, set[str]()

    def advance(self, done: int, name: str = "") -> None:
        self.names.add(name)
        self.bars.advance(self.task, done)
        task = self.bars.tasks[self.task]
        if self.of_bytes:
            counted = f"{len(self.names)} tensors {task.completed / 1e9:.2f}/{(task.total or 0) / 1e9:.2f} GB"
        else:
            counted = f"{task.completed:.0f}/{task.total or 0:.0f}"
        self.bars.update(self.task, done=counted)


def _sizes(result: Any) -> Mapping[str, int]:
    return {entry.path: entry.size_bytes for entry in result.manifest.files.values()}


def _as_json(result: Any) -> dict[str, Any]:
    manifest = result.manifest
    return {
        "output": str(result.output),
        "model": manifest.model,
        "recipe": manifest.recipe,
        "drafter_recipe": manifest.drafter_recipe,
        "context_length": manifest.context_length,
        "num_draft_tokens": manifest.num_draft_tokens,
        "input_bytes": result.input_bytes,
        "files_bytes": _sizes(result),
        "left_aside": list(result.left_aside),
        "notes": list(result.notes),
        "seconds": result.seconds,
    }


def _print(result: Any) -> None:
    manifest, seconds, output = result.manifest, result.seconds, click.format_filename(result.output)
    click.echo(f"{output}: {manifest.model}, {manifest.recipe} (drafter {manifest.drafter_recipe})")
    for name, size in _sizes(result).items():
        click.echo(f"  {name:28} {size / 1e6:10.2f} MB")
    click.echo(
        f"  from {result.input_bytes / 1e6:.2f} MB in {sum(seconds.values()):.1f} s "
        f"({', '.join(f'{name} {s:.1f}' for name, s in seconds.items())})"
    )
    if result.left_aside:
        click.echo(f"  left aside: {', '.join(result.left_aside)}")
    for bits in sorted(set(manifest.bits.values())):
        click.echo(f"  {bits} bits: {', '.join(name for name, count in manifest.bits.items() if count == bits)}")
    click.echo(f"  context {manifest.context_length} tokens, up to {manifest.num_draft_tokens} drafts a round")
    click.echo(f"next: mtp-export run {output} 'def add(a, b):'")
