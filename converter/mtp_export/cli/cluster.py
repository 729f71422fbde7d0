"""`mtp-export cluster`."""

from __future__ import annotations

from pathlib import Path

import click

from mtp_export.cli.options import check_torch_device
from mtp_export.cli.output import working
from mtp_runtime.errors import UserError


@click.command("cluster")
@click.argument("drafter", metavar="DIR|ID")
@click.option("--checkpoint", metavar="DIR|ID", required=True, help="The target that it drafts for.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write the drafter to.")
@click.option(
    "--clusters", type=click.IntRange(1), default=2048, show_default=True, help="A divisor of the vocabulary."
)
@click.option("--top-k", type=click.IntRange(1), help="Clusters that are scored for a draft.  [an eighth of them]")
@click.option("--prompts", type=click.Path(path_type=Path), help="JSONL, as for calibrate.  [55 of the package]")
@click.option(
    "--beginnings",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="Single tokens that are prompts as well.",
)
@click.option("--max-new-tokens", type=click.IntRange(8), default=192, show_default=True, help="Of each answer.")
@click.option("--steps", type=click.IntRange(1), default=1500, show_default=True, help="Of training the centroids.")
@click.option("--drafter-position-offset", type=click.IntRange(0, 1), default=1, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="For the models: cpu or cuda.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
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
    """Give a drafter with a dense head the clusters of a two-stage lookup, which `export` needs.

    Writes a drafter's checkpoint with ordered embeddings, which `export --drafter` and transformers take.
    """
    check_torch_device(device)
    if output.exists():
        raise UserError(f"{output} exists already: choose another --output")
    few = max(1, clusters // 8) if top_k is None else top_k
    with working("loading") as tell:
        import torch

        from mtp_calibration.choose.calibration_texts import calibration_texts, tuning_prompts
        from mtp_calibration.drafter.cluster_head import (
            Clustering,
            check_dense,
            cluster,
            drawn_answers,
            write_clustered,
        )
        from mtp_calibration.drafter.models import load
        from mtp_export.arch.gemma4 import read_target_spec
        from mtp_export.source.checkpoint import Checkpoint
        from mtp_export.source.hub import locate
        from mtp_export.source.texts import stop_token_ids

        dense = Checkpoint(locate(drafter), "drafter")
        check_dense(dense, clusters, few)
        target = Checkpoint(locate(checkpoint), "target")
        spec = read_target_spec(target.config, str(target.folder / "config.json"))
        asked = calibration_texts(target, spec, tuning_prompts(prompts))
        model = load(target.folder, torch.device(device))
        tell("answers of the target")
        answers = drawn_answers(
            model,
            asked,
            stop_token_ids(target, spec),
            beginnings=beginnings,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        ordering, centroids, recall = cluster(
            model,
            load(dense.folder, torch.device(device), trained=True),
            answers,
            Clustering(count=clusters, top_k=few, steps=steps, position_offset=drafter_position_offset),
            on_stage=tell,
        )
        write_clustered(dense, ordering, centroids, few, output)
    click.echo(
        f"{click.format_filename(output)}: {clusters} clusters, of which the best {few} hold {recall:.1%} of the first "
        "choices of the dense head along answers that were kept apart"
    )
