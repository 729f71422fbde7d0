"""Exports that choose on prompts: rounding, formats under a size, and the drafter's head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtp_calibration.bundle_weights import stored_weights
from mtp_calibration.calibration_texts import calibration_texts
from mtp_calibration.corpus import calibration_prompts, for_tuning, held_out, in_turn
from mtp_calibration.float_pair import FloatTarget
from mtp_calibration.head import float_answers, top_ks
from mtp_calibration.metrics import Agreement
from mtp_calibration.quality import target_values
from mtp_export.embedded import EMBEDDED
from mtp_export.pipeline import open_made_from
from mtp_export.reference import greedy
from mtp_runtime import Bundle, read_manifest
from tests.conftest import Export, run_cli


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few, for few seconds."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    chosen = in_turn(for_tuning(calibration_prompts()), 8)
    path.write_text("\n".join(json.dumps({"text": p.text or p.messages[0]["content"]}) for p in chosen))
    return path


def kls(bundles: list[Path]) -> list[float]:
    """KL per token of float's distribution against that of each bundle's weights, on other prompts."""
    pair = open_made_from("nano", None, None, ())
    texts = calibration_texts(pair.target, pair.target_spec, in_turn(held_out(calibration_prompts()), 4))
    target = FloatTarget(pair, max(len(ids) for ids in texts))
    expected = [said.logits for said in target.said(texts)]
    found = []
    for folder in bundles:
        agreement = Agreement()
        said = target.said(texts, target_values(stored_weights(Bundle.open(folder))))
        for ids, reference, one in zip(texts, expected, said, strict=True):
            agreement.add(reference, one.logits, ids, len(ids))
        found.append(agreement.kl_per_token)
    return found


@pytest.mark.parametrize("export_format", ["tflite", "onnx"])
def test_gptq_is_as_small_and_nearer_to_float(
    export_nano: Export, tmp_path: Path, prompts: Path, export_format: str
) -> None:
    plain, output = export_nano("int4", export_format=export_format), tmp_path / "gptq"
    options = ("--recipe", "int4", "--rounding", "gptq", "--prompts", str(prompts), "--target", export_format)
    run_cli("export", *options, "--output", str(output))
    manifests = [read_manifest(folder) for folder in (plain, output)]
    assert [manifest.rounding for manifest in manifests] == ["nearest", "gptq"]
    for role, entry in manifests[1].files.items():
        assert entry.size_bytes == manifests[0].files[role].size_bytes
    nearest, gptq = kls([plain, output])
    assert gptq < 0.7 * nearest


def test_a_size_is_kept_and_better_used_than_by_one_recipe(export_nano: Export, tmp_path: Path, prompts: Path) -> None:
    plain, output = export_nano("int4"), tmp_path / "mixed"
    most = read_manifest(plain).files["litertlm"].size_bytes
    prompts = prompts.with_name("two.jsonl")
    prompts.write_text("\n".join(prompts.with_name("prompts.jsonl").read_text().splitlines()[:2]))
    size = f"{most / 1e6:.6f}MB"
    run_cli("export", "--max-size", size, "--prompts", str(prompts), "--output", str(output))
    manifest = read_manifest(output)
    assert manifest.recipe == "mixed"
    assert set(manifest.bits.values()) == {4, 8}
    assert 0.97 * most < manifest.files["litertlm"].size_bytes <= most
    uniform, mixed = kls([plain, output])
    assert mixed < 0.95 * uniform


def test_settings_of_the_drafter_are_measured(tmp_path: Path, prompts: Path) -> None:
    """On what transformers would say, too."""
    texts = [[2, 300, 400, 500], [2, 310, 410, 510, 610], [2, 700, 800]]
    pair = open_made_from("nano", None, None, ())
    answers = [list(text.ids) for text in float_answers(pair, texts, 20)]
    assert [ids[: len(text)] for ids, text in zip(answers, texts, strict=True)] == texts
    own = [ids[len(text) :] for ids, text in zip(answers, texts, strict=True)]
    assert greedy(EMBEDDED / "target", texts, own) == own
    few = prompts.with_name("one.jsonl")
    few.write_text(prompts.read_text().splitlines()[0])
    options = ("--drafter-position-offset", "auto", "--centroid-top-k", "auto", "--prompts", str(few))
    run_cli("export", *options, "--output", str(tmp_path / "bundle"))
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.drafter_position_offset == 1
    assert manifest.drafter["head"]["top_k"] in top_ks(128)
    assert 1 < manifest.drafter["head"]["top_k"] < 128


def test_a_size_that_nothing_reaches_is_refused(tmp_path: Path) -> None:
    done = run_cli("export", "--max-size", "3MB", "--output", str(tmp_path / "mixed"), check=False)
    assert done.returncode == 2
    assert "--max-size is 0.003 GB and the smallest mixed recipe takes 0.01" in done.stderr
    assert not (tmp_path / "mixed").exists()
