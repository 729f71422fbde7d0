"""A target and its drafter, opened and held against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from mtp_export.arch import gemma4, published
from mtp_export.arch.spec import DrafterSpec, PairSpec, TargetSpec
from mtp_export.config import SourceConfig, in_range
from mtp_export.errors import CheckpointError
from mtp_export.source import texts
from mtp_export.source.adapters import AdaptedCheckpoint, adapter_files
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.embedded import EMBEDDED
from mtp_export.source.generation import GenerationDefaults
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
    generation: GenerationDefaults

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Where generation stops, as the checkpoint says."""
        return self.generation.stop_token_ids


def with_top_k(spec: DrafterSpec, top_k: int | None) -> DrafterSpec:
    """Return a drafter whose head scores so many clusters, by default as many as it says.

    Raises:
        UserError: there are not so many clusters.
    """
    if top_k is None:
        return spec
    in_range("--centroid-top-k", top_k, 1, spec.head.num_centroids)
    return dataclasses.replace(spec, head=dataclasses.replace(spec.head, top_k=top_k))


def open_pair(source: SourceConfig, top_k: int | None = None, find: Callable[[str], Path] = locate) -> Pair:
    """Open and check both checkpoints, the target first: a wrong one costs no download of the drafter. `top_k` is as in
    `with_top_k`; `find` gives the folder of what a user or a model names.

    Raises:
        CheckpointError: one is damaged or of another architecture, or they do not fit each other.
        UserError: as `with_top_k` does.
    """
    model = published.PAIRS[source.model]
    folder = _folder(source.target, model.target_id, "target", find)
    target = AdaptedCheckpoint(folder, "target", source.adapters, chat_template=source.chat_template)
    target_spec = gemma4.read_target_spec(target.config, str(target.folder / "config.json"))
    gemma4.check_model(model.name, "target", model.target, target_spec)
    generation = texts.generation(target, target_spec)
    read_template(target)  # one that cannot be read is an error before the drafter is fetched
    drafter = Checkpoint(_folder(source.drafter, model.drafter_id, "drafter", find), "drafter")
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
        adapters=source.adapters,
        target=target,
        drafter=drafter,
        target_spec=target_spec,
        drafter_spec=with_top_k(drafter_spec, top_k),
        generation=generation,
    )


def open_made_from(model: str, target: str | None, drafter: str | None, adapters: tuple[Path, ...]) -> Pair:
    """Open the pair that a bundle of `model` was made from; None stands for the model's own.

    Raises:
        MtpError: as `open_pair` does, or the model is unknown.
    """
    source = SourceConfig(model=model, target=target, drafter=drafter, adapters=adapters)
    source.check()
    pair = open_pair(source)
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


def _folder(named: str | None, published_id: str, part: str, find: Callable[[str], Path]) -> Path:
    if named is not None:
        return find(named)
    return find(published_id) if published_id else EMBEDDED / part


def input_files(pair: Pair) -> list[tuple[str, Path]]:
    """Return every file that an export depends on, by the part that it belongs to."""
    adapters = [(f"adapter_{i}", path) for i, folder in enumerate(pair.adapters) for path in adapter_files(folder)]
    of_pair = [(part.part, path) for part in (pair.target, pair.drafter) for path in part.files()]
    return of_pair + adapters
