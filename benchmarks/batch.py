"""What does a pass in common save, with drafts and without?

The same eight prompts are generated one after another and through batches of two to eight sequences, plainly and with
drafts, round after round in one run. Figures are committed tokens of all sequences per second, prompts included.

    python -m benchmarks.batch [BUNDLE]

Without a bundle, nano is exported at int4 for eight sequences into build/.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.bundles import exported
from benchmarks.machine import write_result
from mtp_export.check.prompts import heldout_prompts
from mtp_runtime import Session, SessionBatch

PROMPTS = 8


def main() -> int:
    """Measure, print and write the result; return 1 if a sequence in a batch differs from the same alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    path = options.bundle or exported(1024, "int4", "onnx", batch_size=PROMPTS)
    prompts = [prompt.text for prompt in heldout_prompts()[:PROMPTS]]
    request: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "stop_token_ids": ()}
    with (
        Session.open(path, threads=options.threads) as session,
        SessionBatch.open(path, threads=options.threads) as batch,
    ):
        manifest = session.manifest
        sizes = [size for size in (1, 2, 4, 8) if size <= manifest.batch_size]
        depths = (0, manifest.num_draft_tokens)
        seconds = {(k, size): 0.0 for k in depths for size in sizes}
        same = True
        for repeat in range(options.repeats + 1):
            for k in depths:
                alone = []
                for size in sizes:
                    started = time.perf_counter()
                    if size == 1:
                        alone = traces = [session.generate(p, num_draft_tokens=k, **request).finish() for p in prompts]
                    else:
                        some = SessionBatch(batch.sessions[:size])
                        traces = some.generate(prompts, num_draft_tokens=k, **request)
                    if repeat:  # the first time round warms up
                        seconds[k, size] += time.perf_counter() - started
                    same = same and [trace.tokens for trace in traces] == [trace.tokens for trace in alone]
    committed = options.repeats * PROMPTS * options.max_new_tokens
    rows = [
        {
            "num_draft_tokens": k,
            "sequences": size,
            "tokens_per_second": round(committed / taken, 1),
            "of_plain_alone": round(seconds[0, 1] / taken, 3),
        }
        for (k, size), taken in seconds.items()
    ]
    model = f"{manifest.model}, {manifest.recipe}, onnx, graphs for {manifest.batch_size} sequences"
    print(f"{model}, {options.threads} threads; the same tokens as alone: {same}")
    for row in rows:
        print(
            f"K = {row['num_draft_tokens']}, {row['sequences']} sequences: {row['tokens_per_second']:8.1f} tok/s, "
            f"{row['of_plain_alone']:.2f} x plain and alone"
        )
    figures = {"model": model, "threads": options.threads, **request, "same_tokens": same, "rows": rows}
    print(f"written: {write_result('batch', figures)}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
