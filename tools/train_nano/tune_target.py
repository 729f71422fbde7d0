"""Tune nano's target on conversations that begin a row, as they begin a prompt, on one GPU.

    python -m tools.train_nano.tune_target --data build/nano_data --out converter/mtp_export/nano

In the rows that `train_target.py` packs, a conversation sees the one before it, and so learns little from what it
lacks: after that stage alone nano called tools that nobody had declared. Code and prose stay in, for it not to forget.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.train_nano.checkpoints import load_target, save_target
from tools.train_nano.fitting import Fit, training_device, training_options
from tools.train_nano.nano_ids import BOS, PAD
from tools.train_nano.training import Budget, Clock, Corpus, Optimiser, hardware

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
    options = training_options(__doc__, steps=STEPS, seconds=300.0).parse_args()
    clock, device = Clock(), training_device()
    corpus = Corpus(options.data)
    model = load_target(options.out / "target", device)
    fit = Fit(
        optimiser=Optimiser(model, MUON_LR, ADAM_LR, DECAY),
        budget=Budget(options.steps, options.seconds),
        clock=clock,
        device=device,
        warm_up=WARM_UP,
    )
    rng, tokens = np.random.default_rng(SEED), 0

    def loss_of_batch() -> Tensor:
        nonlocal tokens
        rows = batch(corpus, rng)
        tokens += int((rows != PAD).sum())
        ids = rows.to(device)
        logits = model.logits(model(ids[:, :-1])[0])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)

    steps = fit.run(loss_of_batch)
    save_target(model, options.out / "target/model.safetensors")
    log = {"steps": steps, "tokens": tokens, "seconds": clock(), "hardware": hardware(device)}
    (options.out / "tune_target.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
