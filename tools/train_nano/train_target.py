"""Train nano's target on one GPU: next-token prediction on packed documents, bfloat16 autocast.

python -m tools.train_nano.train_target --data build/nano_data --out converter/mtp_export/nano
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.train_nano.checkpoints import save_target
from tools.train_nano.configs import TARGET_CONFIG, write_configs
from tools.train_nano.model import LanguageModel, compile_layers
from tools.train_nano.nano_ids import BOS
from tools.train_nano.training import Budget, Clock, Corpus, Optimiser, hardware, initialise, mean, schedule

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/nano_data"))
    parser.add_argument("--out", type=Path, default=Path("converter/mtp_export/nano"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seconds", type=float, default=600.0, help="end the schedule early if it takes longer")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    clock = Clock()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")

    corpus = Corpus(options.data)
    print(f"{clock():.0f} s: {len(corpus.tokens)} tokens in {len(corpus.starts)} documents", flush=True)
    write_configs(options.out)
    model = LanguageModel(TARGET_CONFIG["text_config"]).to(device)
    initialise(model, SEED)
    optimiser = Optimiser(model, MUON_LR, ADAM_LR, DECAY)

    def head_loss(hidden: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(hidden).flatten(0, 1), wanted.flatten())

    if not options.no_compile:
        compile_layers(model)
        head_loss = torch.compile(head_loss, dynamic=False)
    path = options.out / "target/model.safetensors"
    losses: list[Tensor] = []
    saved, epoch, step = clock(), 0, 0
    budget = Budget(options.steps, options.seconds)
    for step, (epoch, ids) in enumerate(batches(corpus, options.steps, device)):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = head_loss(model(ids[:, :-1])[0], ids[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        done = budget.progress(step + 1)
        optimiser.step(schedule(step, done))
        losses.append(loss.detach())
        if (step + 1) % 200 == 0 or done >= 1 or step in (4, 24):
            print(f"{clock():.0f} s: step {step + 1}, epoch {epoch}, loss {mean(losses):.4f}", flush=True)
            losses.clear()
            if clock() - saved > CHECKPOINT_SECONDS:
                save_target(model, path)
                saved = clock()
        if done >= 1:
            break
    save_target(model, path)
    log = {
        "steps": step + 1,
        "tokens": (step + 1) * TOKENS_PER_STEP,
        "epochs": epoch + 1,
        "seconds": clock(),
        "hardware": hardware(device),
    }
    (options.out / "train_target.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
