"""Is a bundle of nano still nano, are damaged ones told, and how do its drafts fare?

    python -m benchmarks.calibration [--prompts 16]

For int8 and int4: the figures of `mtp-export calibrate` over the prompts in four kinds. Damaged copies of the int8
bundle with the diagnosis. The clustered head by number of clusters and both position conventions, over the bundle's own
answers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.bundles import exported
from benchmarks.machine import write_result
from mtp_calibration.choose import head
from mtp_calibration.report.acceptance import measure_acceptance, on_device
from mtp_calibration.same_model.calibrate import CalibrationOptions, calibrate
from mtp_calibration.same_model.observe import continued
from mtp_export.check.prompts import Prompt, calibration_prompts, heldout_prompts, in_turn
from mtp_export.source.pair import Pair, open_made_from
from mtp_runtime import Session
from tests.support.damage import damaged, doubled_scales, other_position, turned_centroids

DAMAGES = {
    "one layer's scales times 2": doubled_scales("layers.3.mlp.gate_proj.weight"),
    "the same where a norm hides it": doubled_scales("layers.7.self_attn.o_proj.weight"),
    "centroids in another order": turned_centroids,
    "the other position convention": other_position,
}
TOP_KS = (4, 8, 16, 24, 128)


def main() -> int:
    """Measure, print and write the result; return 1 if a sound bundle fails or a damaged one passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts = in_turn(calibration_prompts(), options.prompts)
    pair = open_made_from("nano", None, None, ())
    figures: dict[str, Any] = {"prompts": len(prompts), "recipes": {}, "damaged": {}}
    for recipe in ("int8", "int4"):
        figures["recipes"][recipe] = quality(exported(1024, recipe), pair, prompts)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, damage) in enumerate(DAMAGES.items()):
            bundle = damaged(exported(1024, "int8"), Path(scratch) / str(number), damage)
            report = calibrate(bundle, pair, prompts[:4], CalibrationOptions(max_new_tokens=32))
            figures["damaged"][name] = {"passed": report.passed, "said": report.verdict.summary}
            print(f"{name}: {report.verdict.summary}", flush=True)
    figures |= drafts(exported(1024, "int8"), pair, prompts)
    print(f"written: {write_result('calibration', figures)}")
    sound = all(row["passed"] for row in figures["recipes"].values())
    return 0 if sound and not any(row["passed"] for row in figures["damaged"].values()) else 1


def quality(bundle: Path, pair: Pair, prompts: list[Prompt]) -> dict[str, Any]:
    start = time.perf_counter()
    report = calibrate(bundle, pair, prompts)
    measured = report.quality
    row = {
        "passed": report.passed,
        "tokens": measured.tokens,
        "kl_per_token": measured.kl_per_token,
        "weights_kl_per_token": measured.weights_kl_per_token,
        "top1_agreement": measured.top1_agreement,
        "perplexity": measured.perplexity,
        "float_perplexity": measured.float_perplexity,
        "answers_that_part": sum(d.first is not None for d in measured.divergences),
        "layers": {effect.layer: effect.kl for effect in measured.layers},
        "drafter": msgspec.to_builtins(measured.drafter),
        "structured": msgspec.to_builtins(measured.structured),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(report.recipe, {k: v for k, v in row.items() if k != "layers"}, flush=True)
    return row


def drafts(bundle: Path, pair: Pair, prompts: list[Prompt]) -> dict[str, Any]:
    """Acceptance, heads and positions."""
    options = {"max_tokens": 192, "max_new_tokens": 96}
    with Session.open(bundle, threads=1) as session:
        rows, costs, _ = measure_acceptance(session, prompts, max_new_tokens=64, on_prompt=lambda name: None)
        judged = [continued(session, prompt, **options) for prompt in in_turn(heldout_prompts(), 16)]
    rounds = head.Rounds(pair, judged)
    shipped = head.top_k_curve(rounds, 1, TOP_KS)
    position = head.position_test(rounds, 1)
    here = on_device("here", costs, rows)
    for row in shipped:
        print(row, flush=True)
    print(position, here.advice, sep="\n", flush=True)
    return {
        "acceptance": msgspec.to_builtins(rows),
        "costs": msgspec.to_builtins(costs),
        "advice": here.advice,
        "shipped_head": msgspec.to_builtins(shipped),
        "fewest_clusters_that_are_enough": head.enough(shipped),
        "position": msgspec.to_builtins(position),
    }


if __name__ == "__main__":
    sys.exit(main())
