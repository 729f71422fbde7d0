"""What an export gains by choosing on prompts: nano at int4, rounded by GPTQ, and mixed under int4's size.

    python -m benchmarks.choices

Every bundle is held against float as `mtp-export calibrate` does it, on those prompts of the four kinds that nothing
was chosen on. Goals: GPTQ takes 40 % off int4's KL at the same size; a mixed recipe that is no larger has less KL.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.bundles import exported
from benchmarks.machine import write_result
from mtp_calibration.same_model.calibrate import calibrate
from mtp_export.check.prompts import calibration_prompts, held_out
from mtp_export.source.pair import open_made_from

GOAL = 0.4


def main() -> int:
    """Export, measure and write the result; return 1 if a goal is missed."""
    torch.set_num_threads(1)
    prompts, pair = held_out(calibration_prompts()), open_made_from("nano", None, None, ())
    most = (exported(1024, "int4") / "nano.litertlm").stat().st_size
    bundles = {
        "int4": exported(1024, "int4"),
        "int4, gptq": exported(1024, "int4", options=("--rounding", "gptq")),
        "mixed": exported(1024, "int8", options=("--max-size", f"{most / 1e6:.6f}MB")),
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, bundle in bundles.items():
        quality = calibrate(bundle, pair, prompts).quality
        rows[name] = {
            "litertlm_bytes": (bundle / "nano.litertlm").stat().st_size,
            "kl_per_token": quality.kl_per_token,
            "top1_agreement": quality.top1_agreement,
            "perplexity": quality.perplexity,
            "float_perplexity": quality.float_perplexity,
            "accepted_per_round": quality.drafter.accepted_per_round,
        }
        print(name, rows[name], flush=True)
    kl = {name: row["kl_per_token"] for name, row in rows.items()}
    gained = {name: 1 - kl[name] / kl["int4"] for name in ("int4, gptq", "mixed")}
    result = {"prompts": len(prompts), "bundles": rows, "kl_taken_off": gained}
    print(f"{gained}, written: {write_result('choices', result)}")
    smaller = all(row["litertlm_bytes"] <= most for row in rows.values())
    return 0 if smaller and gained["int4, gptq"] >= GOAL and gained["mixed"] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
