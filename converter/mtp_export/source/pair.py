"""A target and its drafter, opened and held against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from mtp_export.arch import gemma4, published
from mtp_export.arch.spec import DrafterSpec, PairSpec, TargetSpec
from mtp_export.config import ExportConfig, in_range
from mtp_export.errors import CheckpointError
from mtp_export.source import texts
from mtp_export.source.adapters import AdaptedCheckpoint, adapter_files
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.embedded import EMBEDDED
from mtp_export.source.hub import locate
from mtp_export.source.templates import read_template


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """An opened pair that has been checked."""

    model: PairSpec
    adapters: Sequence[Path]
    target: AdaptedCheckpoint
    drafter: Checkpoint
    target_spec: TargetSpec
    drafter_spec: DrafterSpec
    stop_token_ids: tuple[int, ...]


def with_top_k(spec: DrafterSpec, top_k: int | None) -> DrafterSpec:
    """Raises:
    UserError: there are not so many clusters.
    """
    if top_k is None:
        return spec
    in_range("--centroid-top-k", top_k, 1, spec.head.num_centroids)
    return dataclasses.replace(spec, head=dataclasses.replace(spec.head, top_k=top_k))


def open_pair(config: ExportConfig, find: Callable[[str], Path] = locate) -> Pair:
    """Open and check both checkpoints, the target first: a wrong one costs no download of the drafter. `find` gives
    the folder of what a user or a model names.

    Raises:
        CheckpointError: one is damaged or of another architecture, or they do not fit each other.
    """
    model = published.PAIRS[config.model]
    folder = _folder(config.target, model.target_id, "target", find)
    target = AdaptedCheckpoint(folder, "target", config.adapters, chat_template=config.chat_template)
    target_spec = gemma4.read_target_spec(target.config, str(target.folder / "config.json"))
    gemma4.check_model(model.name, "target", model.target, target_spec)
    stop_ids = texts.stop_token_ids(target, target_spec)
    read_template(target)  # a file that cannot be read is told before the drafter is fetched
    drafter = Checkpoint(_folder(config.drafter, model.drafter_id, "drafter", find), "drafter")
    if drafter.formats:
        raise CheckpointError(
            f"{drafter.folder / 'config.json'}: the drafter is stored as integers, expected floats: "
            "take the drafter's own checkpoint, which is published in floats"
        )
    drafter_spec = gemma4.read_drafter_spec(drafter.config, str(drafter.folder / "config.json"))
    gemma4.check_pair(target_spec, drafter_spec)
    gemma4.check_model(model.name, "drafter", model.drafter, drafter_spec)
    return Pair(
        model=model,
        adapters=config.adapters,
        target=target,
        drafter=drafter,
        target_spec=target_spec,
        drafter_spec=with_top_k(drafter_spec, config.centroid_top_k),
        stop_token_ids=stop_ids,
    )


def open_made_from(model: str, target: str | None, drafter: str | None, adapters: tuple[Path, ...]) -> Pair:
    """Open the pair that a bundle of `model` was made from; None stands for the model's own.

    Raises:
        MtpError: as `open_pair` does, or the model is unknown.
    """
    config = ExportConfig(
        model=model,
        export_format="tflite",
        target=target,
        drafter=drafter,
        recipe="f32",
        output=Path(),
        adapters=adapters,
    )
    config.check()
    pair = open_pair(config)
    check_floats(pair)
    return pair


def check_floats(pair: Pair) -> None:
    """Check that a pair is in floats: what measures a bundle holds it against them.

    Raises:
        CheckpointError: it is stored as integers.
    """
    if pair.target.formats:
        raise CheckpointError(
            f"{pair.target.folder / 'config.json'}: the target is stored as integers, and there are no floats to hold "
            "a bundle against: leave --gate out, and compare with `mtp-export parity`"
        )


def _folder(given: str | None, published_id: str, part: str, find: Callable[[str], Path]) -> Path:
    if given is not None:
        return find(given)
    return find(published_id) if published_id else EMBEDDED / part


def input_files(pair: Pair) -> list[tuple[str, Path]]:
    """Every file that an export depends on, by the part that it belongs to."""
    adapters = [(f"adapter_{i}", path) for i, folder in enumerate(pair.adapters) for path in adapter_files(folder)]
    of_pair = [(part.part, path) for part in (pair.target, pair.drafter) for path in part.files()]
    return of_pair + adapters
