"""The seam `Refinement`: what every refinement promises to an export, measured or not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from mtp_calibration.choose.refinement import MeasuredRefinement
from mtp_export.config import ExportConfig, RefinementConfig, SourceConfig
from mtp_export.errors import OutputError
from mtp_export.formats.format import format_of
from mtp_export.pair_graphs import Settings, TracedPair, room_bytes, trace_pair
from mtp_export.refinement import AsConfigured, Refinement, WeightsRequest
from mtp_export.source.pair import open_pair
from mtp_export.weights.recipes import INT4
from mtp_runtime.errors import UserError

CONFIG = ExportConfig(source=SourceConfig(model="nano"), output=Path("nowhere"))
REFINEMENTS = {"as configured": AsConfigured(), "measured": MeasuredRefinement()}


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
        refinement.gate(tmp_path, traced.settings, Silent())
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


def with_refinement(traced: TracedPair, refinement: RefinementConfig) -> TracedPair:
    settings = dataclasses.replace(
        traced.settings, config=dataclasses.replace(traced.settings.config, refinement=refinement)
    )
    return dataclasses.replace(traced, settings=settings)


def test_tables_are_fitted_whatever_graphs_are_written_already(traced: TracedPair, tmp_path: Path) -> None:
    """An export that goes on after its target was written gives the tables the bytes of one that was not killed."""
    few_bits = {
        role: {
            name: dataclasses.replace(parameter, format=INT4.for_columns(parameter.shape[1]))
            if len(parameter.shape) == 2
            else parameter
            for name, parameter in values.items()
        }
        for role, values in traced.values.items()
    }
    rounding = dataclasses.replace(with_refinement(traced, RefinementConfig(rounding="gptq")), values=few_bits)
    request = WeightsRequest(
        traced=rounding, format=format_of(CONFIG.format), folder=tmp_path, written=frozenset({"target"})
    )
    refined = MeasuredRefinement().weights(request, Silent())
    for role in ("embedder", "per_layer_embedder"):
        assert {parameter.format.scale for parameter in refined.values[role].values()} == {"fitted"}
    assert refined.values["target"] == few_bits["target"]


def test_a_disk_without_room_for_scratch_files_is_refused_before_anything_is_rounded(
    traced: TracedPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format, rounding = format_of(CONFIG.format), with_refinement(traced, RefinementConfig(rounding="gptq"))
    bundle_bytes = room_bytes(format, sum(format.file_sizes(traced.graphs, traced.values).values()))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=bundle_bytes + 1000))
    request = WeightsRequest(traced=rounding, format=format, folder=tmp_path, written=frozenset())
    with pytest.raises(OutputError, match="GB free and the bundle needs"):
        MeasuredRefinement().weights(request, Silent())
