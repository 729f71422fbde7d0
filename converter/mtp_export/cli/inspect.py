"""`mtp-export inspect`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtp_export.cli.exit_codes import FAILED
from mtp_export.cli.options import bundle_argument, debug_option, json_option
from mtp_export.cli.output import context_text
from mtp_export.config import DELEGATES, one_of

if TYPE_CHECKING:
    from mtp_runtime import Manifest


@click.command("inspect")
@bundle_argument
@click.option("--delegate", default="gpu", show_default=True, help="The backend to check the operators for: gpu.")
@json_option("the metadata and the operators")
@debug_option
def command(bundle: Path, delegate: str, as_json: bool, debug: bool) -> None:
    """Print a bundle's metadata, its contexts, and what a GPU does not take.

    The metadata is what LiteRT-LM reads. A GPU backend runs target and drafter only if it takes each of their
    operators. The exit code is 1 if it does not. No GPU is needed: the answer comes from a table of operators that were
    run on a real GPU (docs/gpu.md).
    """
    one_of("--delegate", delegate, [name for name in DELEGATES if name != "cpu"])
    import msgspec

    from mtp_export.formats.tflite.gpu_table import delegate_table, inspect_bundle

    table = delegate_table(delegate)
    refused_by_role = inspect_bundle(bundle, table)
    whole = not any(refused_by_role.values())
    metadata, manifest = _metadata(bundle)
    origin = {} if manifest.chat_template is None else msgspec.to_builtins(manifest.chat_template)
    if as_json:
        graphs = {
            role: [{"form": r.form, "reason": r.reason, "signatures": dict(r.signatures)} for r in refused]
            for role, refused in refused_by_role.items()
        }
        document = {"bundle": str(bundle), "delegate": delegate, "wholly_delegated": whole, "graphs": graphs}
        container = {"metadata": metadata, "chat_template": origin, "context": _context(manifest)}
        click.echo(json.dumps(document | {"learnt": table.learnt} | container))
    else:
        _print_metadata(metadata, origin)
        _print_context(manifest)
        for role, refused in refused_by_role.items():
            count = sum(sum(r.signatures.values()) for r in refused)
            click.echo(f"{role}: {f'{count} operators are left to the CPU' if count else 'wholly delegated'}")
            for r in refused:
                places = ", ".join(f"{name} {n}" for name, n in r.signatures.items())
                click.echo(f"  {r.form}\n    {r.reason}\n    in {places}")
        machine = table.learnt["machine"]
        click.echo(f"learnt on {machine['gpu']}, driver {machine['driver']}, {table.learnt['forms']} forms")
    if not whole:
        sys.exit(FAILED)


def _metadata(path: Path) -> tuple[dict[str, Any], Manifest]:
    """The metadata of the bundle's container, by field, and the bundle's manifest."""
    from mtp_export.bundle.metadata import fields_of
    from mtp_runtime.bundle.bundle import Bundle
    from mtp_runtime.bundle.litertlm import read_metadata

    with Bundle.open(path, verify=False) as bundle:
        container = bundle.path("litertlm") if path.is_dir() else path
        return fields_of(read_metadata(container)), bundle.exported


def _context(manifest: Manifest) -> dict[str, Any]:
    """The contexts of a bundle, and how many tokens of a text may be taken back: None for any number."""
    from mtp_export.bundle.ring_reach import rewindable_tokens

    return {
        "default": manifest.context_length,
        "longest": manifest.longest_context_length or manifest.context_length,
        "chosen_at_load": manifest.chooses_context,
        "ring_length": manifest.ring_length,
        "rewindable_tokens": rewindable_tokens(manifest),
    }


def _print_context(manifest: Manifest) -> None:
    from mtp_export.bundle.ring_reach import rewindable_tokens

    click.echo(context_text(manifest))
    if manifest.ring_length:
        click.echo(
            f"  sliding layers keep {manifest.ring_length} positions: an answer can be taken back by up to "
            f"{rewindable_tokens(manifest)} tokens\n"
            "  beyond that a reply is empty, and all that follow: start the conversation again with its messages\n"
            "  with constrained decoding it would be wrong instead: export with --rings off, or take nothing back"
        )


def _print_metadata(metadata: dict[str, Any], origin: dict[str, Any]) -> None:
    click.echo("metadata for LiteRT-LM:")
    for name, value in metadata.items():
        if name != "jinja_prompt_template":
            click.echo(f"  {name}: {json.dumps(value, ensure_ascii=False)}")
            continue
        published = f", of {origin['of']}, published {origin['published']}" if origin.get("published") else ""
        source = f"from {origin['source']}, SHA-256 {origin['sha256'][:16]}…{published}" if origin else "unknown"
        click.echo(f"  {name}: {len(value)} characters, {source}")
