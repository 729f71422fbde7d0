"""Train nano's target on one GPU: next-token prediction on packed documents, bfloat16 autocast.

python -m tools.train_nano.train_target --data build/nano_data --out converter/mtp_export/nano
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.train_nano.checkpoints import save_target
from tools.train_nano.configs import TARGET_CONFIG, write_configs
from tools.train_nano.fitting import Fit, training_device, training_options
from tools.train_nano.model import LanguageModel, compile_layers
from tools.train_nano.nano_ids import BOS
from tools.train_nano.training import Budget, Clock, Corpus, Optimiser, hardware, initialise

SEED = 7
TOKENS_PER_STEP = 65_536
LENGTH = 2048
STEPS = 9000
MUON_LR, ADAM_LR, DECAY = 0.015, 3e-3, 0.03
CHECKPOINT_SECONDS = 90.0


def batches(corpus: Corpus, steps: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield (epoch, ids [B, T + 1]) for each step; every row begins with BOS."""
    rng = np.random.default_rng(SEED)
    epochs = corpus.rows(rng)
    flat, epoch = next(epochs)
    stream, at = torch.from_numpy(flat).to(device), 0
    count = TOKENS_PER_STEP // LENGTH
    need = count * (LENGTH + 1)
    for _ in range(steps):
        if at + need > len(stream):
            flat, epoch = next(epochs)
            stream, at = torch.from_numpy(flat).to(device), 0
        ids = stream[at : at + need].view(count, LENGTH + 1).long()
        ids[:, 0] = BOS
        at += need
        yield epoch, ids


def main() -> None:
    """Train, log, and save the target in bfloat16 with intermediate checkpoints."""
    parser = training_options(__doc__, steps=STEPS, seconds=600.0)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    clock, device = Clock(), training_device()
    corpus = Corpus(options.data)
    print(f"{clock():.0f} s: {len(corpus.tokens)} tokens in {len(corpus.starts)} documents", flush=True)
    write_configs(options.out)
    model = LanguageModel(TARGET_CONFIG["text_config"]).to(device)
    initialise(model, SEED)

    def head_loss(hidden: Tensor, expected: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(hidden).flatten(0, 1), expected.flatten())

    if not options.no_compile:
        compile_layers(model)
        head_loss = torch.compile(head_loss, dynamic=False)
    path = options.out / "target/model.safetensors"
    fit = Fit(
        optimiser=Optimiser(model, MUON_LR, ADAM_LR, DECAY),
        budget=Budget(options.steps, options.seconds),
        clock=clock,
        device=device,
        save=lambda: save_target(model, path),
        save_seconds=CHECKPOINT_SECONDS,
    )
    stream, epoch = batches(corpus, options.steps, device), 0

    def loss_of_batch() -> Tensor:
        nonlocal epoch
        epoch, ids = next(stream)
        return head_loss(model(ids[:, :-1])[0], ids[:, 1:])

    steps = fit.run(loss_of_batch, lambda: f", epoch {epoch}")
    save_target(model, path)
    log = {
        "steps": steps,
        "tokens": steps * TOKENS_PER_STEP,
        "epochs": epoch + 1,
        "seconds": clock(),
        "hardware": hardware(device),
    }
    (options.out / "train_target.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
