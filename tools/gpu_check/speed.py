"""E2B or E4B at its true shapes with synthetic weights, in stock LiteRT-LM on the GPU: time of a token and of a round.

No draft of random weights is accepted, so a pass with drafts commits one token, and its time is that of a round. What
MTP gains at a given acceptance follows from that, because a round costs the same whatever is accepted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from mtp_export.stock_runtime import run_stock
from mtp_runtime import read_manifest

_PROMPTS = ("def add(a, b):\n    return", "class Stack:\n    def push(self") * 2
_TOKENS = 64


def check_speed(model: str, folder: Path) -> dict[str, Any]:
    """Synthesise and export a pair unless it is there, and run it with drafts and without."""
    pair, bundle = folder / model, folder / f"{model}-int4-gpu"
    if not pair.exists():
        _run("tools.synthesize", "--model", model, "--output", str(pair))
    if not bundle.exists():
        parts = ("--checkpoint", str(pair / "target"), "--drafter", str(pair / "drafter"))
        _run(
            "mtp_export.cli", "--model", model, "--recipe", "int4", "--delegate", "gpu", *parts, "--output", str(bundle)
        )
    manifest = read_manifest(bundle)
    rows = []
    for activations in ("fp32", "fp16"):
        ms = []
        for use_mtp in (False, True):
            run = run_stock(
                bundle / manifest.files["litertlm"].path,
                _PROMPTS,
                max_new_tokens=_TOKENS,
                context_length=manifest.context_length,
                use_mtp=use_mtp,
                backend="gpu",
                activations=activations,
            )
            # The first output pays for compiling shaders.
            ms.append(statistics.median(output.decode_ms / output.num_tokens for output in run.outputs[1:]))
            row: dict[str, Any] = {"activations": activations, "mtp": use_mtp, "acceptance": run.acceptance_rate}
            rows.append(row | {"load_ms": round(run.load_ms), "token_or_round_ms": round(ms[-1], 2)})
        rows[-1]["gain"] = gains(ms[0], ms[1], manifest.num_draft_tokens)
    return {"model": model, "recipe": "int4", "num_draft_tokens": manifest.num_draft_tokens, "rows": rows}


def gains(token_ms: float, round_ms: float, num_draft_tokens: int) -> dict[str, float]:
    """Speed against plain decoding, where each draft is accepted with a probability once those before it were."""
    return {
        str(rate): round(sum(rate**i for i in range(num_draft_tokens + 1)) * token_ms / round_ms, 3)
        for rate in (0.6, 0.8)
    }


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, cwd=ROOT)
