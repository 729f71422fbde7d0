"""The seam `Refinement`: what an export settles by measuring its pair. mtp_calibration measures; here nothing is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from mtp_export.config import ExportConfig
from mtp_export.formats.format import Format
from mtp_export.pair_graphs import Settings, TracedPair
from mtp_export.progress import Progress
from mtp_export.source.pair import Pair
from mtp_export.weights.parameter import Values
from mtp_runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsRequest:
    """The parameters that a recipe gives, to be refined. `folder` may hold scratch files. Graphs of the roles `written`
    are written already, so their values are worth no work."""

    traced: TracedPair
    format: Format
    folder: Path
    written: frozenset[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinedWeights:
    """Parameters by role and name, and the bits of each part where they are not the recipe's."""

    values: Values
    bits: Mapping[str, int]


class Refinement(Protocol):
    """Measures a pair for an export, as `RefinementConfig` says."""

    def check(self, config: ExportConfig, pair: Pair) -> None:
        """Check that a pair can be measured as the config says, before anything slow begins.

        Raises:
            CheckpointError: it cannot, since it is stored as integers.
            UserError: nothing measures what the config leaves open.
        """

    def settings(self, traced: TracedPair, format: Format, progress: Progress) -> TracedPair:
        """Settle what is to be the best of its values, and trace the pair anew where that changes it."""

    def weights(self, request: WeightsRequest, progress: Progress) -> RefinedWeights:
        """Choose formats under a size, and round by what matrices are multiplied with.

        Raises:
            UserError: the smallest formats are too large.
            OutputError: the disk has no room for scratch files.
        """

    def gate(self, folder: Path, settings: Settings, progress: Progress) -> None:
        """Measure a finished bundle and write the result into its folder.

        Raises:
            GateError: it is not the model any more.
        """


class AsConfigured:
    """The refinement of an export that measures nothing."""

    def check(self, config: ExportConfig, pair: Pair) -> None:
        if config.refinement.needs_prompts or config.refinement.gate:
            raise UserError(
                "the config is to be settled by measuring, and nothing measures: give export() a Refinement, such as "
                "mtp_calibration.choose.refinement.MeasuredRefinement"
            )

    def settings(self, traced: TracedPair, format: Format, progress: Progress) -> TracedPair:
        return traced

    def weights(self, request: WeightsRequest, progress: Progress) -> RefinedWeights:
        return RefinedWeights(values=request.traced.values, bits={})

    def gate(self, folder: Path, settings: Settings, progress: Progress) -> None:
        return
