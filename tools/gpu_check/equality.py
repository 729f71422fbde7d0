"""What stock LiteRT-LM says on the GPU, with drafts and without, whatever the drafter, against our runtime on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mtp_export.stock_runtime import run_stock
from tools.gpu_check.drafters import DRAFTERS, with_drafter

ACTIVATIONS = ("fp32", "fp16")


def say(
    container: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    context_length: int,
    on_run: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Run a `.litertlm` on the GPU: plainly and with each drafter, for both kinds of activations."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for activations in ACTIVATIONS:
            for drafter in ("", *DRAFTERS):
                on_run(f"{container.parent.name}, {activations}, {drafter or 'plain'}")
                path = with_drafter(container, drafter, Path(folder) / "changed.litertlm") if drafter else container
                run = run_stock(
                    path,
                    prompts,
                    max_new_tokens=max_new_tokens,
                    context_length=context_length,
                    use_mtp=bool(drafter),
                    backend="gpu",
                    activations=activations,
                )
                runs.append({"activations": activations, "drafter": drafter, "run": run})
    return runs
