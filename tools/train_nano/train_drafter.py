"""Train nano's drafter on the target's own outputs, then its clusters and their centroids, on one GPU.

    python -m tools.train_nano.train_drafter --data build/nano_data --out converter/mtp_export/nano

The target continues training prefixes (mostly greedy). Every position of those texts is then the beginning of a
round at once: four chained draft steps against the target's own next-token distributions.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mtp_calibration.drafter.clusters import balanced_clusters, cluster_means
from mtp_calibration.drafter.loss import DEPTH
from tools.train_nano.checkpoints import load_drafter, load_target, save_drafter
from tools.train_nano.configs import DRAFTER_CONFIG, write_configs
from tools.train_nano.drafter_loss import StepLoss, centroid_loss, chained_loss, step_loss
from tools.train_nano.fitting import Fit, training_device, training_options
from tools.train_nano.model import Drafter, LanguageModel, compile_layers
from tools.train_nano.own_texts import LENGTH, SEED, own_answers, own_outputs
from tools.train_nano.training import Budget, Clock, Corpus, Optimiser, hardware, initialise, mean, schedule

GENERATED_BATCH, GENERATED_BATCHES, CHAT_BATCHES = 4096, 12, 8
CHAT_SHARE = 0.25  # of the rows of a step
BATCH, CENTROID_BATCH = 64, 24
STEPS, CENTROID_STEPS = 4500, 300
CLUSTER_ROUNDS = 25
MUON_LR, ADAM_LR, DECAY, CENTROID_LR = 0.015, 3e-3, 0.01, 5e-3
GO_ON_SHARE = 0.3  # of the learning rates, where a drafter learns a target that was tuned
CHECKPOINT_SECONDS = 60.0


class Samples:
    """Rows of the target's own texts, a fixed share of them conversations."""

    def __init__(self, texts: Tensor, answers: Tensor) -> None:
        """Take both pools. Shapes: texts [rows, LENGTH], answers [rows, LENGTH]."""
        self._texts, self._answers = texts, answers
        self._generator = torch.Generator().manual_seed(SEED)

    @property
    def num_tokens(self) -> int:
        """Tokens in both pools."""
        return int(self._texts.numel() + self._answers.numel())

    def draw(self, count: int) -> Tensor:
        """Draw rows at random. Shapes: -> [count, LENGTH], int64."""
        chats = int(count * CHAT_SHARE)
        rows = [
            pool[torch.randint(len(pool), (share,), generator=self._generator).to(pool.device)]
            for pool, share in ((self._texts, count - chats), (self._answers, chats))
        ]
        return torch.cat(rows).long()


@dataclass(frozen=True, kw_only=True)
class Training:
    """The pair that is trained, its texts, and when training began."""

    model: LanguageModel
    drafter: Drafter
    samples: Samples
    clock: Clock
    device: torch.device


def generate(options: argparse.Namespace, model: LanguageModel, clock: Clock) -> Samples:
    """Let the target write the texts to learn from."""
    corpus = Corpus(options.data)
    texts = own_outputs(model, corpus, options.generated_batches, options.generated_batch, clock)
    answers = own_answers(model, corpus, options.chat_batches, options.generated_batch)
    print(f"{clock():.0f} s: {answers.numel() / 1e6:.1f} M tokens of chats", flush=True)
    return Samples(texts, answers)


def new_drafter(device: torch.device) -> Drafter:
    """Return a drafter with random weights."""
    drafter = Drafter(DRAFTER_CONFIG).to(device)
    initialise(drafter, SEED)
    return drafter


def train_dense(training: Training, options: argparse.Namespace, path: Path) -> int:
    """Train the drafter with its dense head, write checkpoints to `path` and return the number of steps."""
    model, drafter = training.model, training.drafter
    judge: StepLoss = step_loss
    if not options.no_compile:
        compile_layers(model)
        compile_layers(drafter)
        judge = torch.compile(step_loss, dynamic=False)
    share = GO_ON_SHARE if options.go_on else 1.0
    fit = Fit(
        optimiser=Optimiser(drafter, share * MUON_LR, share * ADAM_LR, DECAY),
        budget=Budget(options.steps, options.seconds),
        clock=training.clock,
        device=training.device,
        save=lambda: save_drafter(drafter, path),
        save_seconds=CHECKPOINT_SECONDS,
    )
    shares: list[Tensor] = []

    def loss_of_batch() -> Tensor:
        loss, agreement = chained_loss(drafter, model, training.samples.draw(BATCH), judge)
        shares.append(agreement.detach())
        return loss

    def note() -> str:
        per_step = " ".join(f"{value:.3f}" for value in torch.stack(shares).mean(0).tolist())
        shares.clear()
        return f", agreement {per_step}"

    return fit.run(loss_of_batch, note)


@torch.no_grad()
def cluster(drafter: Drafter) -> None:
    """Give the drafter clusters of its vocabulary, with the mean rows as their centroids."""
    rows = drafter.model.embed_tokens.weight.detach().float().cpu()
    head = drafter.masked_embedding
    ordering = balanced_clusters(rows.clone(), head.centroids.out_features, seed=SEED, rounds=CLUSTER_ROUNDS)
    head.token_ordering.copy_(ordering.flatten())
    head.centroids.weight.copy_(cluster_means(rows, ordering))


def train_centroids(training: Training, steps: int) -> None:
    """Train the centroids alone to point to the cluster of the dense head's first choice."""
    drafter, clock = training.drafter, training.clock
    clusters = drafter.clusters_of_tokens()
    print(f"{clock():.0f} s: clustered", flush=True)
    drafter.requires_grad_(False)
    drafter.masked_embedding.centroids.requires_grad_(True)
    centroids = torch.optim.AdamW(drafter.masked_embedding.centroids.parameters(), lr=CENTROID_LR, weight_decay=0.0)
    recalls: list[Tensor] = []
    for number in range(steps):
        with torch.autocast(training.device.type, dtype=torch.bfloat16):
            batch = training.samples.draw(CENTROID_BATCH)
            loss, recall = centroid_loss(drafter, training.model, batch, clusters)
        loss.backward()  # type: ignore[no-untyped-call]
        centroids.param_groups[0]["lr"] = CENTROID_LR * schedule(number, (number + 1) / steps, warm_up=20)
        centroids.step()
        centroids.zero_grad()
        recalls.append(recall.detach())
        if (number + 1) % 100 == 0:
            print(f"{clock():.0f} s: centroids step {number + 1}, recall {mean(recalls[-100:]):.4f}", flush=True)


def main() -> None:
    """Generate, train the dense drafter, cluster its vocabulary, train the centroids, save."""
    parser = training_options(__doc__, steps=STEPS, seconds=600.0)
    parser.add_argument("--centroid-steps", type=int, default=CENTROID_STEPS)
    parser.add_argument("--generated-batches", type=int, default=GENERATED_BATCHES)
    parser.add_argument("--chat-batches", type=int, default=CHAT_BATCHES)
    parser.add_argument("--generated-batch", type=int, default=GENERATED_BATCH)
    parser.add_argument("--go-on", action="store_true", help="from the drafter of --out, for a target tuned since")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    clock, device = Clock(), training_device()
    write_configs(options.out)
    model = load_target(options.out / "target", device).requires_grad_(False)
    samples = generate(options, model, clock)
    generated_seconds = clock()
    drafter = load_drafter(options.out / "drafter", device) if options.go_on else new_drafter(device)
    training = Training(model=model, drafter=drafter, samples=samples, clock=clock, device=device)
    path = options.out / "drafter/model.safetensors"
    steps = train_dense(training, options, path)
    dense_seconds = clock() - generated_seconds
    if not options.go_on:
        cluster(drafter)
    train_centroids(training, options.centroid_steps)
    save_drafter(drafter, path)
    log = {
        "generated_tokens": samples.num_tokens,
        "generation_seconds": generated_seconds,
        "steps": steps,
        "positions": steps * BATCH * (LENGTH - DEPTH),
        "dense_seconds": dense_seconds,
        "seconds": clock(),
        "hardware": hardware(device),
    }
    name = "tune_drafter.json" if options.go_on else "train_drafter.json"
    (options.out / name).write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
