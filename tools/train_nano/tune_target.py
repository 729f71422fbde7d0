"""Tune nano's target on conversations that begin a row, as they begin a prompt, on one GPU.

    python -m tools.train_nano.tune_target --data build/nano_data --out converter/mtp_export/nano

In the rows that `train_target.py` packs, a conversation sees the one before it, and so learns little from what it
lacks: after that stage alone nano called tools that nobody had declared. Code and prose stay in, for it not to forget.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.train_nano.checkpoints import load_target, save_target
from tools.train_nano.nano_ids import BOS, PAD
from tools.train_nano.training import Budget, Clock, Corpus, Optimiser, hardware, mean, schedule

SEED = 13
ROWS, CHAT_ROWS, LENGTH = 96, 64, 384
STEPS = 2000
MUON_LR, ADAM_LR, DECAY = 0.003, 6e-4, 0.0
WARM_UP = 50


def batch(corpus: Corpus, rng: np.random.Generator) -> Tensor:
    """Conversations, filled up with PAD, then parts of code and prose. Shapes: → [ROWS, LENGTH + 1]."""
    rows = np.full((ROWS, LENGTH + 1), PAD, dtype=np.int64)
    first = sum(corpus.counts[:2])
    for row, number in enumerate(rng.integers(first, first + corpus.counts[2], CHAT_ROWS)):
        ids = corpus.tokens[corpus.starts[number] : corpus.ends[number]][: LENGTH + 1]
        rows[row, : len(ids)] = ids
    rows[CHAT_ROWS:] = corpus.prompts(rng, ROWS - CHAT_ROWS, LENGTH + 1)
    rows[:, 0] = BOS
    return torch.from_numpy(rows)


def main() -> None:
    """Tune the target of --out in place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/nano_data"))
    parser.add_argument("--out", type=Path, default=Path("converter/mtp_export/nano"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seconds", type=float, default=300.0, help="end the schedule early if it takes longer")
    options = parser.parse_args()
    clock = Clock()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    corpus = Corpus(options.data)
    model = load_target(options.out / "target", device)
    optimiser = Optimiser(model, MUON_LR, ADAM_LR, DECAY)
    rng = np.random.default_rng(SEED)
    budget = Budget(options.steps, options.seconds)
    losses: list[Tensor] = []
    step = tokens = 0
    for step in range(options.steps):
        ids = batch(corpus, rng)
        tokens += int((ids != PAD).sum())
        ids = ids.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model.logits(model(ids[:, :-1])[0])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
        loss.backward()  # type: ignore[no-untyped-call]
        done = budget.progress(step + 1)
        optimiser.step(schedule(step, done, warm_up=WARM_UP))
        losses.append(loss.detach())
        if (step + 1) % 200 == 0 or done >= 1 or step in (4, 24):
            print(f"{clock():.0f} s: step {step + 1}, loss {mean(losses):.4f}", flush=True)
            losses.clear()
        if done >= 1:
            break
    save_target(model, options.out / "target/model.safetensors")
    log = {"steps": step + 1, "tokens": tokens, "seconds": clock(), "hardware": hardware(device)}
    (options.out / "tune_target.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
