"""The gate on real bundles of nano: sound ones pass, damaged ones are told what is wrong with them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from mtp_calibration.choose.refinement import MeasuredRefinement
from mtp_calibration.same_model.calibrate import Calibration, CalibrationOptions, calibrate
from mtp_calibration.same_model.gate import bars_for, judge
from mtp_calibration.same_model.quality import Quality
from mtp_export.check.prompts import calibration_prompts, in_turn
from mtp_export.config import ExportConfig, RefinementConfig, SourceConfig
from mtp_export.errors import GateError
from mtp_export.pair_graphs import Settings
from mtp_export.source.embedded import EMBEDDED
from mtp_export.source.pair import Pair, open_made_from
from mtp_runtime import read_manifest
from tests.conftest import Export, run_cli
from tests.support.damage import damaged, doubled_scales, other_position, turned_centroids

_GATE, _BEHIND_A_NORM = "layers.3.mlp.gate_proj.weight", "layers.7.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def pair() -> Pair:
    return open_made_from("nano", None, None, ())


def calibrated(bundle: Path, pair: Pair, prompts: int = 2) -> Calibration:
    options = CalibrationOptions(max_new_tokens=24)
    return calibrate(bundle, pair, in_turn(calibration_prompts(), prompts), options)


def test_float_weights_change_nothing(export_nano: Export, pair: Pair) -> None:
    result = calibrated(export_nano("f32"), pair)
    assert result.passed, result.verdict.summary
    assert result.quality.kl_per_token < 1e-5
    assert max(result.quality.hops.values()) < 1e-5


def test_a_sound_bundle_passes_unless_a_bar_is_missed(export_nano: Export, tmp_path: Path) -> None:
    """Its hops differ from float by the rounding of eight bits; a bar that is missed names the worst layers."""
    options = ("--limit", "4", "--max-new-tokens", "24", "--output", str(tmp_path), "--json", "--max-kl", "1e-4")
    done = run_cli("calibrate", str(export_nano("int8")), *options, check=False)
    assert done.returncode == 1
    worst = re.search(r"expected at most 0.0001; worst layers: (.*): take a finer", done.stderr)
    assert worst is not None
    figures = [float(figure) for figure in re.findall(r"KL (\S+)\)", worst[1])]
    assert figures == sorted(figures, reverse=True)
    assert len(figures) == 3
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "calibration.json").read_text()) == result
    quality = msgspec.convert(result["quality"], Quality)
    assert judge(quality, read_manifest(export_nano("int8")), bars_for("int8")).passed
    assert 1e-4 <= quality.kl_per_token <= 0.02
    assert max(quality.hops.values()) < 0.05


def test_each_damage_has_its_own_finding(export_nano: Export, pair: Pair, tmp_path: Path) -> None:
    """Each has one finding that says what is wrong: no output would show three of the four."""

    def damage(folder: Path) -> None:
        for one in (doubled_scales(_GATE), doubled_scales(_BEHIND_A_NORM), turned_centroids, other_position):
            one(folder)

    result = calibrated(damaged(export_nano("int8"), tmp_path / "bundle", damage), pair)
    assert not result.passed
    findings = sorted((finding.part, finding.diagnosis) for finding in result.verdict.findings)
    assert [part for part, _ in findings] == ["clustered head", "position", "target", "target"]
    assert "centroids are in another order" in findings[0][1]
    assert "says drafter_position_offset 0 and the graph adds 1" in findings[1][1]
    for (_, diagnosis), name in zip(findings[2:], (_GATE, _BEHIND_A_NORM), strict=True):
        assert f"100% of the rows of {name} are 2 times the checkpoint's" in diagnosis


class Stages:
    """The stages that an export tells of."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None:
        self.names.append(stage)

    def advance(self, done: int, name: str = "") -> None:
        raise AssertionError("the gate counts nothing")


def test_an_export_keeps_no_bundle_that_misses_the_gate(export_nano: Export, pair: Pair, tmp_path: Path) -> None:
    """The last stage of `export --gate`, on the folder that would take the output's name."""
    refinement = MeasuredRefinement(gate_prompts=1)
    config = ExportConfig(
        source=SourceConfig(model="nano"), output=tmp_path / "out", refinement=RefinementConfig(gate=True)
    )
    settings = Settings(config=config, pair=pair)
    bundle = damaged(export_nano("int8"), tmp_path / "bundle", turned_centroids)
    with pytest.raises(GateError, match=r"was not kept: clustered head: .* centroids are in another order"):
        refinement.gate(bundle, settings, Stages())
    assert not (bundle / "calibration.json").exists()
    sound = damaged(export_nano("int8"), tmp_path / "sound", lambda folder: None)
    stages = Stages()
    refinement.gate(sound, settings, stages)
    assert json.loads((sound / "calibration.json").read_text())["passed"] is True
    assert "the bundle against the float model" in stages.names


def test_another_checkpoint_is_refused(export_nano: Export, tmp_path: Path) -> None:
    """A bundle is only held against what it was made from."""
    other = tmp_path / "drafter"
    shutil.copytree(EMBEDDED / "drafter", other)
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"post_projection.weight": weights["post_projection.weight"] * 2}, other / "model.safetensors")
    done = run_cli("calibrate", str(export_nano("int8")), "--drafter", str(other), check=False)
    assert done.returncode == 2
    assert "was not made from" in done.stderr
