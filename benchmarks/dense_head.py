"""Does a dense drafter of nano get by with an eighth of its vocabulary once it has clusters, refined on many states?

    python -m benchmarks.dense_head [--pieces 160]

Centroids are refined along nano's answers to pieces of this repository's documents and sources, and judged along its
answers to held-out prompts. Goal: the dense first choice is among the candidates in 98 % of states.
"""

from __future__ import annotations

import argparse
import sys

import msgspec
import torch

from benchmarks.bundles import exported
from benchmarks.calibration import dense_head
from benchmarks.machine import ROOT, write_result
from mtp_calibration import head
from mtp_calibration.corpus import Prompt, heldout_prompts, in_turn
from mtp_calibration.observe import continued
from mtp_export.pipeline import open_made_from
from mtp_runtime import Session

GOAL = 0.98
_PIECE = 400  # characters


def pieces(count: int) -> list[Prompt]:
    """Pieces of documents and sources, evenly over all of them."""
    files = [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "converter").rglob("*.py"))]
    texts = [(path, path.read_text(encoding="utf-8")) for path in files]
    cut = [
        Prompt(id=f"{path.name}-{at}", kind="own", text=text[at : at + _PIECE])
        for path, text in texts
        for at in range(0, len(text) - _PIECE, _PIECE)
    ]
    return cut[:: max(1, len(cut) // count)][:count]


def main() -> int:
    """Build, judge, print and write the result; return 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=160)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pair = open_made_from("nano", None, None, ())
    lengths = {"max_tokens": 192, "max_new_tokens": 96}
    with Session.open(exported(1024, "int8"), threads=1) as session:
        judged = [continued(session, prompt, **lengths) for prompt in in_turn(heldout_prompts(), 16)]
        tuning = [continued(session, prompt, **lengths) for prompt in pieces(options.pieces)]
    states = sum(len(text.ids) - text.start for text in tuning)
    curve = dense_head(head.Rounds(pair, judged), head.Rounds(pair, tuning))
    for row in curve:
        print(row)
    print(f"written: {write_result('dense_head', {'positions': states, 'curve': msgspec.to_builtins(curve)})}")
    eighth = next(row for row in curve if row.scored == 1 / 8)
    print(f"{eighth.recall:.2%} at an eighth, goal {GOAL:.0%}")
    return 0 if eighth.recall >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
