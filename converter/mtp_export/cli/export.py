"""`mtp-export export`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtp_export.bundle.staging import check_output
from mtp_export.cli.options import (
    adapter_option,
    by_model,
    checkpoint_options,
    combined,
    debug_option,
    json_option,
    model_option,
    output_option,
    prompts_option,
)
from mtp_export.cli.output import context_text, export_progress, print_notes
from mtp_export.config import (
    EXPORT_FORMATS,
    ExportConfig,
    FormatConfig,
    GraphConfig,
    QuantisationConfig,
    RefinementConfig,
    SourceConfig,
)
from mtp_export.weights.recipes import RECIPES, Recipe, WeightFormat
from mtp_runtime.errors import UserError

if TYPE_CHECKING:
    from mtp_export.refinement import Refinement


def _one_format(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> str:
    """Return the one export format that `--format` and its older name `--target` give.

    Raises:
        UserError: they give several.
    """
    if len(set(values)) > 1:
        raise UserError(f"--format (or --target, its older name) has the values {', '.join(values)}: give one")
    return values[0]


# What to export. `config_of` takes these options.
export_options = combined(
    model_option,
    click.option(
        "--format",
        "--target",
        "export_format",
        multiple=True,
        default=("tflite",),
        show_default=True,
        callback=_one_format,
        metavar="|".join(EXPORT_FORMATS),
        help="Export format. --target is the older name of this option.",
    ),
    checkpoint_options("The target: a folder or Hugging Face id.", "The drafter: a folder or Hugging Face id."),
    adapter_option,
    click.option(
        "--chat-template",
        type=click.Path(path_type=Path),
        help="Jinja file to use instead of the checkpoint's chat template.",
    ),
    click.option(
        "--recipe",
        default="int8",
        show_default=True,
        help="Quantisation of the target: a recipe of the list below.",
    ),
    click.option("--drafter-recipe", help="Quantisation of the drafter.  [f32 with f32, else int8]"),
    click.option(
        "--embedder-recipe", help="Quantisation of the tables of token embeddings.  [the recipe of the target]"
    ),
    click.option(
        "--rounding",
        default="nearest",
        show_default=True,
        help="Rounding of the target's matrices: nearest, or gptq, which keeps their outputs on --prompts.",
    ),
    click.option(
        "--max-size",
        help="Largest size of the bundle, as 2.4GB. Parts get fewer bits where --prompts suffer least.",
    ),
    prompts_option("JSONL, as for `calibrate`: for gptq, --max-size and auto.  [55 of the package]"),
    click.option(
        "--cache-length",
        type=int,
        help="Longest context in tokens, prompt and answer. An app chooses how much of it is allocated when it loads a "
        "bundle for LiteRT-LM on a CPU. For a GPU and for ONNX: slots of the caches, a context of K tokens fewer.  "
        f"[{by_model(lambda pair: pair.sizes.longest_context)}; otherwise the default context]",
    ),
    click.option(
        "--default-context",
        type=int,
        help="Context of an app that chooses none.  "
        f"[{by_model(lambda pair: pair.sizes.context_length)}, at most --cache-length]",
    ),
    click.option(
        "--rings",
        help="Slots of sliding layers' caches, a power of two, or off for as many as the context. Fewer take less "
        "memory; an answer can be taken back by no more than they hold.  "
        f"[{by_model(lambda pair: pair.sizes.ring_length)}]",
    ),
    click.option(
        "--num-draft-tokens",
        type=int,
        help=f"K, the most tokens drafted in a round.  [{by_model(lambda pair: pair.sizes.num_draft_tokens)}]",
    ),
    click.option(
        "--drafter-position-offset",
        default="1",
        show_default=True,
        help="Position of the drafter: 1 as in transformers, 0 as in vLLM, auto for the better on --prompts. It "
        "changes how many drafts are accepted, never the output.",
    ),
    click.option(
        "--centroid-top-k",
        help="Clusters whose tokens the drafter scores. auto: as few as keep its drafts on --prompts.  [the drafter's]",
    ),
    click.option(
        "--delegate",
        default="cpu",
        show_default=True,
        help="TFLite: cpu, or gpu for a bundle that a GPU runs too. It is slower on a CPU.",
    ),
    click.option(
        "--composites",
        is_flag=True,
        help="With --delegate gpu: norms as LiteRT-LM's own operator. Faster, but MTP equals plain output less often.",
    ),
    click.option("--portable", is_flag=True, help="ONNX: standard operations only. Slower with long caches."),
    click.option(
        "--batch-size",
        type=int,
        default=1,
        show_default=True,
        help="ONNX: write further graphs for this many sequences at once.",
    ),
    click.option("--gate", is_flag=True, help="Run `calibrate` on the bundle, and keep it only if that passes."),
    output_option("Folder to write.  [./<model>-<format>]"),
    click.option("--force", is_flag=True, help="Replace an existing bundle."),
    click.option("--workers", type=int, help="Conversion processes.  [number of CPUs, at most 4]"),
)


def recipe_list() -> str:
    """Return the recipes as lines for a help page, made from their formats."""
    lines = (f"  {name:12} {_recipe_line(recipe)}" for name, recipe in RECIPES.items())
    return "\n".join(("\b", "Recipes, with the bits of a weight:", *lines))


def _recipe_line(recipe: Recipe) -> str:
    others = {
        "head": recipe.head,
        "embedding": recipe.embedding,
        "per-layer embedding": recipe.per_layer_embedding,
    }
    names: dict[int, list[str]] = {}
    for name, form in others.items():
        if form.bits != recipe.linear.bits:
            names.setdefault(form.bits, []).append(name)
    if recipe.linear_int8:
        names.setdefault(8, []).append(f"{len(recipe.linear_int8)} kinds of projections")
    exceptions = [f"; {', '.join(parts)} {bits}" for bits, parts in names.items()]
    return _form(recipe.linear) + "".join(exceptions)


def _form(form: WeightFormat) -> str:
    blocks = f" in blocks of {form.block_size}" if form.block_size else ""
    lattice = ", for QAT checkpoints of llama.cpp's q4_0" if form.scale == "q4_0" else ""
    return f"{form.bits}{blocks}{lattice}"


# What may be auto, and what it is where nothing else is clearly better.
_MEASURED = {"drafter_position_offset": "1", "centroid_top_k": None}


def _rings(text: str | None) -> int | None:
    """Return the slots of rings that an option asks for: 0 for none, None for the model's own.

    Raises:
        UserError: it is neither a number nor off.
    """
    if text is None or text == "off":
        return None if text is None else 0
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise UserError(f"--rings is {text!r}, expected a number or off")
    return int(text)


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
        graph=GraphConfig(
            **counts,
            context_length=options["default_context"],
            ring_length=_rings(options["rings"]),
            **_some(options, "cache_length", "num_draft_tokens"),
        ),
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

    return MeasuredRefinement()


def _count(name: str, text: str | None) -> int | None:
    if text is not None and not text.isdecimal():
        raise UserError(f"--{name.replace('_', '-')} is {text!r}, expected a number or auto")
    return None if text is None else int(text)


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)", size)
    if match is None:
        raise UserError(f"--max-size is {size!r}, expected a number with MB, GB, MiB or GiB, as 2.4GB")
    return int(float(match[1]) * {"MB": 1e6, "GB": 1e9, "MiB": 1 << 20, "GiB": 1 << 30}[match[2]])


@click.command("export", epilog=recipe_list())
@export_options
@click.option("--dry-run", is_flag=True, help="Print the plan instead, as `plan` does.")
@click.option("--resume", is_flag=True, help="Continue an export that was killed. The output must be the same.")
@json_option("the result")
@debug_option
def command(dry_run: bool, resume: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Write a bundle.

    It holds target, drafter and embedders, as TFLite files and as one .litertlm, or as ONNX files.
    """
    config = config_of(options)
    if dry_run:
        from mtp_export.cli.plan import show_plan

        show_plan(config, as_json=as_json)
        return
    with export_progress() as progress:
        progress.start("loading", 0)
        from mtp_export.export import export

        result = export(config, progress, refinement_of(config.refinement), resume=resume)
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
        "longest_context_length": manifest.longest_context_length,
        "ring_length": manifest.ring_length,
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
    click.echo(f"  {context_text(manifest)}, up to {manifest.num_draft_tokens} drafts a round")
    click.echo(f"next: mtp-export run {output} 'def add(a, b):'")
