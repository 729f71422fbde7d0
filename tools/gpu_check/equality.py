"""What stock LiteRT-LM says on the GPU: with drafts as without them, whatever the drafter, and as the CPU says it?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mtp_export.check.stock_runtime import StockRequest, StockRun, run_stock
from mtp_runtime import Session
from mtp_runtime.measure.parity import common_pieces
from tools.gpu_check.drafters import DRAFTERS, with_drafter

# The CPU's margin between the two best logits (soft-capped at ±30) up to which a difference is a near-tie. In fp32 it
# is the one of `mtp-export parity`; float16 has a step of 0.008 at logits of 8 to 16, and sums of it make more.
TOLERANCES = {"fp32": 0.05, "fp16": 0.25}
_AT_ONCE = 8


def check_equality(
    bundle: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    drafters: Sequence[str] = DRAFTERS,
    kinds: Sequence[str] = tuple(TOLERANCES),
    on_run: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run a bundle on the GPU, plainly and with each drafter, with each kind of activations; a row of figures for each.

    Texts are held against plain decoding on the GPU in the same precision, and against our runtime on the CPU. A
    difference is told with the CPU's margin at its place.
    """
    rows = []
    with Session.open(bundle) as session, tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        container, length = session.bundle.path("litertlm"), session.manifest.context_length
        files = {name: with_drafter(container, name, Path(folder) / f"{name}.litertlm") for name in drafters}

        def run(activations: str, drafter: str) -> StockRun:
            on_run(f"{bundle.name}: GPU, {activations}, {drafter or 'plain'}")
            return run_stock(
                StockRequest(
                    model_path=str(files.get(drafter, container)),
                    prompts=prompts,
                    max_new_tokens=max_new_tokens,
                    context_length=length,
                    use_mtp=bool(drafter),
                    backend="gpu",
                    activations=activations,
                )
            )

        # Side by side: a small model leaves most of a GPU idle, and nothing is timed here.
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            runs = [(activations, drafter) for activations in kinds for drafter in ("", *drafters)]
            running = {key: pool.submit(run, *key) for key in runs}
            on_run(f"{bundle.name}: CPU")
            cpu = [_on_cpu(session, prompt, max_new_tokens) for prompt in prompts]
            texts = {key: [output.text for output in future.result().outputs] for key, future in running.items()}
            acceptance = {key: future.result().acceptance_rate for key, future in running.items()}
        for key in runs:
            tolerance = TOLERANCES[key[0]]
            rows.append(
                {"recipe": session.manifest.recipe, "activations": key[0], "drafter": key[1] or "none"}
                | {"acceptance_rate": acceptance[key]}
                | {"against_plain": _verdicts(session, prompts, texts[key[0], ""], texts[key], tolerance)}
                | {"against_cpu": _verdicts(session, prompts, cpu, texts[key], tolerance)}
            )
    return rows


def _on_cpu(session: Session, prompt: str, max_new_tokens: int) -> str:
    trace = session.generate(prompt, max_new_tokens=max_new_tokens, num_draft_tokens=0).finish()
    return "".join(session.text_pieces(trace.tokens))


def _verdicts(
    session: Session, prompts: Sequence[str], expected: Sequence[str], texts: Sequence[str], tolerance: float
) -> dict[str, Any]:
    """Return how many texts are equal as far as both go, and the margin at each first difference."""
    margins = []
    agreed = compared = 0
    for prompt, ours, theirs in zip(prompts, expected, texts, strict=True):
        tokens, same, both = first_difference(session, prompt, ours, theirs)
        agreed, compared = agreed + same, compared + both
        if same < both:
            ids = [*session.tokenize(prompt), *tokens[:same]]
            trace = session.generate(
                ids, max_new_tokens=1, num_draft_tokens=0, stop_token_ids=(), with_margins=True
            ).finish()
            margins.append(round(trace.margins[0], 4))
    return {
        "equal": len(prompts) - len(margins),
        "near_ties": sum(margin <= tolerance for margin in margins),
        "different": sum(margin > tolerance for margin in margins),
        "tokens_agreed": agreed,
        "tokens_compared": compared,
        "margins": sorted(margins),
    }


def first_difference(session: Session, prompt: str, expected: str, text: str) -> tuple[list[int], int, int]:
    """Return the tokens of the expected text, how many of them lead `text`, and how many both texts are long enough
    for: with drafts a runtime says its last round whole, and ends earlier where it meets a stop token."""
    tokens = session.tokenize(prompt + expected)[len(session.tokenize(prompt)) :]
    pieces = session.text_pieces(tokens)
    agreed = common_pieces(pieces, text)
    ended = len("".join(pieces[:agreed])) >= len(text)
    return tokens, agreed, agreed if ended else len(pieces)
