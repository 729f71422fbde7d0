"""`mtp-export cluster`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtp_export.cli.options import (
    check_torch_device,
    count_option,
    debug_option,
    drafter_position_offset_option,
    max_new_tokens_option,
    output_option,
    prompts_option,
    seed_option,
    torch_device_option,
)
from mtp_export.cli.output import working
from mtp_runtime.errors import UserError

if TYPE_CHECKING:
    from mtp_calibration.drafter.answers import Answer
    from mtp_export.source.checkpoint import Checkpoint


@click.command("cluster")
@click.argument("drafter", metavar="DIR|ID")
@click.option("--checkpoint", metavar="DIR|ID", required=True, help="The target: a folder or Hugging Face id.")
@output_option("Folder to write the drafter to.", required=True)
@count_option("--clusters", 2048, "Number of clusters. It must divide the size of the vocabulary.")
@click.option("--top-k", type=click.IntRange(1), help="Clusters whose tokens are scored.  [an eighth of the clusters]")
@prompts_option("JSONL, as for `calibrate`.  [55 of the package]")
@count_option("--beginnings", 512, "Number of further prompts that are a single token.", least=0)
@max_new_tokens_option(192, least=8, help_text="Longest answer of the target.")
@count_option("--steps", 1500, "Steps of training.")
@drafter_position_offset_option
@seed_option
@torch_device_option
@debug_option
def command(
    drafter: str,
    checkpoint: str,
    output: Path,
    clusters: int,
    top_k: int | None,
    prompts: Path | None,
    beginnings: int,
    max_new_tokens: int,
    steps: int,
    drafter_position_offset: int,
    seed: int,
    device: str,
    debug: bool,
) -> None:
    """Give a drafter a clustered head.

    `export` needs one and some drafters have a dense head. The vocabulary is cut into clusters. A draft then scores the
    clusters first, and the tokens of the best ones only. The result is a drafter checkpoint, which `export --drafter`
    and transformers read.
    """
    check_torch_device(device)
    if output.exists():
        raise UserError(f"{output} exists already: choose another --output")
    few = max(1, clusters // 8) if top_k is None else top_k
    with working("loading") as show:
        import torch

        from mtp_calibration.drafter.cluster_head import Clustering, check_dense, cluster, write_clustered
        from mtp_calibration.drafter.models import load
        from mtp_export.source.checkpoint import Checkpoint
        from mtp_export.source.hub import locate

        dense = Checkpoint(locate(drafter), "drafter")
        check_dense(dense, clusters, few)
        target = Checkpoint(locate(checkpoint), "target")
        model = load(target.folder, torch.device(device))
        show("answers of the target")
        answers = _answers(target, model, prompts, beginnings=beginnings, max_new_tokens=max_new_tokens, seed=seed)
        ordering, centroids, recall = cluster(
            model,
            load(dense.folder, torch.device(device), trained=True),
            answers,
            Clustering(count=clusters, top_k=few, steps=steps, position_offset=drafter_position_offset),
            on_stage=show,
        )
        write_clustered(dense, ordering, centroids, few, output)
    click.echo(
        f"{click.format_filename(output)}: {clusters} clusters, of which the best {few} hold {recall:.1%} of the first "
        "choices of the dense head along answers that were kept apart"
    )


def _answers(target: Checkpoint, model: Any, prompts: Path | None, **drawing: int) -> list[Answer]:
    """Return what the target answers to the prompts of a file, or of the package; `drawing` is for `drawn_answers`."""
    from mtp_calibration.choose.calibration_texts import calibration_texts, tuning_prompts
    from mtp_calibration.drafter.cluster_head import drawn_answers
    from mtp_export.arch.gemma4 import read_target_spec
    from mtp_export.source.texts import stop_token_ids

    spec = read_target_spec(target.config, str(target.folder / "config.json"))
    texts = calibration_texts(target, spec, tuning_prompts(prompts))
    return drawn_answers(model, texts, stop_token_ids(target, spec), **drawing)
