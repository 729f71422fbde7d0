"""What a short prefill is worth in stock LiteRT-LM: time to the first token of a short prompt, memory, and how full a
chat gets, for bundles that differ in their prefill lengths.

    python -m benchmarks.prefill_lengths BUNDLE.litertlm…

Prints a line for each bundle; each figure is the median of three runs, taken in turns, each in a process of its own.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from mtp_export.check.stock_runtime import StockRequest, run_stock

PROMPT = "What is a river?"
RUNS = 3


def main() -> None:
    """Measure and print."""
    paths = [Path(argument) for argument in sys.argv[1:]]
    first_ms: dict[Path, list[float]] = {path: [] for path in paths}
    load_ms: dict[Path, list[float]] = {path: [] for path in paths}
    peak: dict[Path, list[int]] = {path: [] for path in paths}
    for _ in range(RUNS):
        for path in paths:
            run = run_stock(
                StockRequest(
                    model_path=str(path), prompts=[PROMPT] * 3, max_new_tokens=4, context_length=1024, use_mtp=True
                )
            )
            first_ms[path].append(run.outputs[-1].first_token_ms)
            load_ms[path].append(run.load_ms)
            peak[path].append(run.peak_memory_bytes or 0)
    for path in paths:
        print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB, first token {statistics.median(first_ms[path]):.0f} ms, "
            f"load {statistics.median(load_ms[path]) / 1000:.1f} s, peak {statistics.median(peak[path]) / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
