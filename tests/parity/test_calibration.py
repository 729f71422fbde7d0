"""The gate on real bundles of nano: sound ones pass, damaged ones are told what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mtp_export import pipeline
from mtp_export.embedded import EMBEDDED
from mtp_export.errors import GateError
from tests.conftest import Export, run_cli
from tests.damage import Damage, damaged, doubled_scales, other_position, turned_centroids

_GATE = "layers.3.mlp.gate_proj.weight"
# What is damaged, and what the gate must say of it: every text of a line, and none of the others'.
DAMAGES: dict[str, tuple[Damage, str, tuple[str, ...]]] = {
    "scales": (doubled_scales(_GATE), "target", ("100% of the rows", _GATE, "2 times")),
    "scales that a norm hides": (doubled_scales("layers.7.self_attn.o_proj.weight"), "target", ("layers.7", "2 times")),
    "centroids": (turned_centroids, "clustered head", ("centroids are in another order",)),
    "position": (other_position, "position", ("says drafter_position_offset 0 and the graph adds 1",)),
}


def calibrated(bundle: Path, output: Path) -> tuple[int, dict]:  # type: ignore[type-arg]  # parsed JSON
    options = ("--limit", "4", "--max-new-tokens", "32", "--output", str(output), "--json")
    done = run_cli("calibrate", str(bundle), *options, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_sound_bundle_passes(export_nano: Export, tmp_path: Path) -> None:
    """And its hops say where it differs: not in float, and by the rounding of eight bits."""
    for recipe, low, high in (("f32", 0.0, 1e-5), ("int8", 1e-4, 0.02)):
        code, found = calibrated(export_nano(recipe), tmp_path / recipe)
        assert (code, found["passed"], found["verdict"]["findings"]) == (0, True, [])
        assert low <= found["quality"]["kl_per_token"] <= high
        assert max(found["quality"]["hops"].values()) < (1e-5 if recipe == "f32" else 0.05)
        assert json.loads((tmp_path / recipe / "calibration.json").read_text()) == found


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_diagnosed(export_nano: Export, tmp_path: Path, name: str) -> None:
    damage, part, texts = DAMAGES[name]
    bundle = damaged(export_nano("int8"), tmp_path / "bundle", damage)
    code, found = calibrated(bundle, tmp_path)
    assert (code, found["passed"]) == (1, False)
    findings = found["verdict"]["findings"]
    assert {finding["part"] for finding in findings} == {part}
    for text in texts:
        assert text in findings[0]["diagnosis"]


def test_a_missed_bar_names_the_worst_layers(export_nano: Export, tmp_path: Path) -> None:
    options = ("--limit", "4", "--max-new-tokens", "32", "--output", str(tmp_path), "--max-kl", "1e-4")
    done = run_cli("calibrate", str(export_nano("int8")), *options, check=False)
    assert done.returncode == 1
    assert "KL per token is" in done.stderr
    assert "expected at most 0.0001; worst layers: layer 3 (KL" in done.stderr


class Stages:
    """The stages that an export tells of."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None:
        self.names.append(stage)

    def advance(self, done: int, name: str = "") -> None:
        raise AssertionError("the gate counts nothing")


def test_an_export_keeps_no_bundle_that_misses_the_gate(
    export_nano: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage of `export --gate`, on the folder that would take the output's name."""
    monkeypatch.setattr(pipeline, "_GATE_PROMPTS", 2)
    pair = pipeline.open_made_from("nano", None, None, ())
    bundle = damaged(export_nano("int8"), tmp_path / "bundle", turned_centroids)
    with pytest.raises(GateError, match=r"was not kept: clustered head: .* centroids are in another order"):
        pipeline._pass_gate(bundle, pair, Stages())
    sound = damaged(export_nano("int8"), tmp_path / "sound", lambda folder: None)
    stages = Stages()
    pipeline._pass_gate(sound, pair, stages)
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
