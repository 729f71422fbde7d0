"""Clusters for nano's drafter as if its head were dense: do the best of them hold the dense first choice?

    python -m benchmarks.dense_head [--beginnings 192 --threads 1]

They are built as `mtp-export cluster` builds them, along drawn answers to the calibration prompts that settings are
chosen on and to single tokens, and judged along the answers of the int8 bundle to 16 held-out prompts. Goal: 98 % of
the dense first choices among an eighth of the vocabulary.
"""

from __future__ import annotations

import argparse
import sys

import msgspec
import torch

from benchmarks.bundles import exported
from benchmarks.machine import write_result
from mtp_calibration.choose import head
from mtp_calibration.choose.calibration_texts import calibration_texts
from mtp_calibration.drafter.cluster_head import Clustering, cluster, drawn_answers
from mtp_calibration.drafter.models import load
from mtp_calibration.same_model.observe import continued
from mtp_export.check.prompts import calibration_prompts, for_tuning, heldout_prompts, in_turn
from mtp_export.source.pair import open_made_from
from mtp_runtime import Session

GOAL = 0.98
TOP_KS = (4, 8, 16, 24)
CPU = torch.device("cpu")


def main() -> int:
    """Build, judge and write the result; return 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beginnings", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = open_made_from("nano", None, None, ())
    with Session.open(exported(1024, "int8"), threads=options.threads) as session:
        prompts = in_turn(heldout_prompts(), 16)
        judged = [continued(session, prompt, max_tokens=192, max_new_tokens=96) for prompt in prompts]
    rounds = head.Rounds(pair, judged)
    clusters = len(rounds.drafter.centroids)
    target, dense = load(pair.target.folder, CPU), load(pair.drafter.folder, CPU, trained=True)
    texts = calibration_texts(pair.target, pair.target_spec, for_tuning(calibration_prompts()))
    answers = drawn_answers(
        target, texts, pair.stop_token_ids, beginnings=options.beginnings, max_new_tokens=192, seed=0
    )
    print(f"{len(answers)} answers", flush=True)
    ordering, centroids, apart = cluster(
        target, dense, answers, Clustering(count=clusters, top_k=clusters // 8, steps=800, position_offset=1)
    )
    drafter = rounds.drafter
    drafter.ordering, drafter.centroids = ordering, centroids
    drafter.cluster_of_token[ordering] = torch.arange(clusters)[:, None].expand_as(ordering)
    curve = head.top_k_curve(rounds, 1, TOP_KS)
    for row in curve:
        print(row)
    reached = next(row.recall for row in curve if row.top_k == clusters // 8)
    figures = {
        "clusters": clusters,
        "answers": len(answers),
        "recall_along_answers_kept_apart": apart,
        "heads": msgspec.to_builtins(curve),
        "goal": GOAL,
        "reached": reached,
    }
    print(f"written: {write_result('dense_head', figures)}")
    return 0 if reached >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
