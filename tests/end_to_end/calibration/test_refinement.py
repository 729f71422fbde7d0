"""The seam `Refinement`: what every refinement promises to an export, measured or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtp_calibration.choose.refinement import MeasuredRefinement
from mtp_export.config import ExportConfig, RefinementConfig, SourceConfig
from mtp_export.formats.format import format_of
from mtp_export.pair_graphs import Settings, TracedPair, trace_pair
from mtp_export.refinement import AsConfigured, Refinement, WeightsRequest
from mtp_export.source.pair import open_pair
from mtp_runtime.errors import UserError

CONFIG = ExportConfig(source=SourceConfig(model="nano"), output=Path("nowhere"))
REFINEMENTS = {"as configured": AsConfigured(), "measured": MeasuredRefinement(RefinementConfig())}


class Silent:
    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None:
        raise AssertionError(f"nothing is left open, and {stage} began")

    def advance(self, done: int, name: str = "") -> None: ...


@pytest.fixture(scope="module")
def traced() -> TracedPair:
    return trace_pair(Settings(config=CONFIG, pair=open_pair(CONFIG.source)), format_of(CONFIG.format))


@pytest.mark.parametrize("refinement", REFINEMENTS.values(), ids=REFINEMENTS.keys())
class TestRefinement:
    """Where a config leaves nothing open, nothing is measured and every value is the one that came in."""

    def test_it_has_nothing_to_check(self, refinement: Refinement, traced: TracedPair) -> None:
        refinement.check(CONFIG, traced.settings.pair)

    def test_settings_stay(self, refinement: Refinement, traced: TracedPair) -> None:
        assert refinement.settings(traced, format_of(CONFIG.format), Silent()) is traced

    def test_weights_stay(self, refinement: Refinement, traced: TracedPair, tmp_path: Path) -> None:
        request = WeightsRequest(traced=traced, format=format_of(CONFIG.format), folder=tmp_path, written=frozenset())
        refined = refinement.weights(request, Silent())
        assert refined.values is traced.values
        assert refined.bits == {}
        assert list(tmp_path.iterdir()) == []

    def test_no_gate_is_passed_without_a_look(self, refinement: Refinement, traced: TracedPair, tmp_path: Path) -> None:
        refinement.gate(tmp_path, traced.settings.pair, Silent())
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "open_value",
    [
        RefinementConfig(gate=True),
        RefinementConfig(rounding="gptq"),
        RefinementConfig(max_size_bytes=1),
        RefinementConfig(measured=("centroid_top_k",)),
    ],
)
def test_what_is_left_open_is_refused_where_nothing_measures(open_value: RefinementConfig, traced: TracedPair) -> None:
    config = ExportConfig(source=CONFIG.source, output=CONFIG.output, refinement=open_value)
    with pytest.raises(UserError, match="nothing measures: give export"):
        AsConfigured().check(config, traced.settings.pair)
