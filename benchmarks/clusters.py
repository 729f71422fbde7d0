"""What clustering the vocabulary of a dense drafter of published size costs: time and memory.

    python -m benchmarks.clusters [--vocab 262144 --hidden 1024 --clusters 2048 --threads 2]

The embedding is seeded: 4096 directions of unequal weight with noise, which is how embeddings look to k-means. Goals:
at most 600 s and 4 GiB on two cores, and the same clusters from the same input.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch

from benchmarks.machine import write_result
from mtp_calibration.drafter.clusters import ROUNDS, balanced_clusters

GOAL_S, GOAL_BYTES = 600.0, 4 << 30
_TOPICS = 4096


def embedding(vocab: int, hidden: int) -> torch.Tensor:
    """Shapes: -> [vocab, hidden]"""
    generator = torch.Generator().manual_seed(7)
    topics = torch.randn(min(_TOPICS, vocab), hidden, generator=generator)
    own = torch.multinomial(1.0 / torch.arange(1, len(topics) + 1), vocab, replacement=True, generator=generator)
    rows = torch.empty(vocab, hidden).normal_(generator=generator)
    for start in range(0, vocab, 8192):
        rows[start : start + 8192] += topics[own[start : start + 8192]]
    return rows


def main() -> int:
    """Cluster, print, write the result; return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("vocab", 262144), ("hidden", 1024), ("clusters", 2048), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = embedding(options.vocab, options.hidden)
    start = time.perf_counter()
    ordering = balanced_clusters(
        rows,
        options.clusters,
        on_round=lambda n: print(f"round {n} of {ROUNDS}: {time.perf_counter() - start:.0f} s", flush=True),
    )
    seconds = time.perf_counter() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    means = torch.stack([torch.nn.functional.normalize(rows[tokens].mean(0), dim=-1) for tokens in ordering])
    cosine = sum(float((rows[tokens] @ mean).sum()) for tokens, mean in zip(ordering, means, strict=True))
    figures = {
        "vocab": options.vocab,
        "hidden": options.hidden,
        "clusters": options.clusters,
        "threads": options.threads,
        "rounds": ROUNDS,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "mean_cosine": round(cosine / options.vocab, 4),
    }
    print(f"{seconds:.0f} s, {peak / 2**30:.2f} GiB, mean cosine {figures['mean_cosine']}")
    print(f"written: {write_result('clusters', figures)}")
    return 0 if seconds <= GOAL_S and peak <= GOAL_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
