"""Measure a bundle and judge it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from mtp_calibration.same_model.gate import Bars, Verdict, bars_for, judge
from mtp_calibration.same_model.measure import measure
from mtp_calibration.same_model.quality import Quality
from mtp_export.check.prompts import Prompt
from mtp_export.errors import CheckpointError
from mtp_export.source.checkpoint import hash_file
from mtp_export.source.pair import Pair, input_files
from mtp_runtime import Manifest, Session

CALIBRATION_NAME = "calibration.json"
MAX_TOKENS = 192  # of a prompt with its answer
MAX_NEW_TOKENS = 64


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The quality of a bundle and the verdict on it, as calibration.json has them."""

    model: str
    recipe: str
    passed: bool
    verdict: Verdict
    quality: Quality

    def to_json(self) -> str:
        """Serialise, as calibration.json has it."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How a bundle is measured. bars: to be cleared, by default the recipe's; max_new_tokens: of each answer."""

    bars: Bars | None = None
    threads: int = 1
    max_new_tokens: int = MAX_NEW_TOKENS


def calibrate(
    path: Path,
    pair: Pair,
    prompts: Sequence[Prompt],
    options: CalibrationOptions = CalibrationOptions(),
    *,
    on_stage: Callable[[str], None] = lambda name: None,
) -> Calibration:
    """Hold the bundle at `path` against the pair that it was made from.

    Raises:
        MtpError: the bundle cannot be run.
    """
    with Session.open(path, threads=options.threads) as session:
        manifest = session.manifest
        room = min(MAX_TOKENS, manifest.context_length)
        new_tokens = min(options.max_new_tokens, room // 2)
        quality = measure(session, pair, prompts, max_tokens=room, max_new_tokens=new_tokens, on_stage=on_stage)
    verdict = judge(quality, manifest, options.bars or bars_for(manifest.recipe))
    return Calibration(
        model=manifest.model, recipe=manifest.recipe, passed=verdict.passed, verdict=verdict, quality=quality
    )


def check_inputs(pair: Pair, manifest: Manifest) -> None:
    """Check that a bundle was made from this pair, by the hashes in its manifest.

    Raises:
        CheckpointError: another file was used, or one is missing.
    """
    stated = {entry.path: entry.sha256 for entry in manifest.inputs}
    for part, path in input_files(pair):
        name = f"{part}/{path.name}"
        if stated.get(name) != hash_file(path).sha256:
            raise CheckpointError(
                f"the bundle was not made from {path}: name what it was made from with --checkpoint, --drafter and "
                "--adapter"
            )
