"""Train nano's drafter on the target's own outputs, then its clusters and their centroids, on one GPU.

    python -m tools.train_nano.train_drafter --data build/nano_data --out converter/mtp_export/nano

The target continues training prefixes (mostly greedy). Every position of those texts is then the beginning of a
round at once: four chained draft steps against the target's own next-token distributions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.train_nano.checkpoints import load_drafter, load_target, save_drafter
from tools.train_nano.clusters import balanced_clusters, cluster_means
from tools.train_nano.configs import DRAFTER_CONFIG, write_configs
from tools.train_nano.generation import Generator
from tools.train_nano.model import Drafter, KeyValue, LanguageModel, compile_layers
from tools.train_nano.nano_ids import STOP_IDS
from tools.train_nano.training import Budget, Clock, Corpus, Optimiser, hardware, initialise, mean, schedule

StepLoss = Callable[[Drafter, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
SEED = 11
STEPS_PER_ROUND = 4
LENGTH = 512
PROMPT_LENGTHS = (24, 64, 128, 192, 288)
GENERATED_BATCH, SAMPLED_SHARE, TEMPERATURE = 4096, 0.2, 0.7
GENERATED_BATCHES = 12
CHAT_BATCHES, CHAT_PROMPT, CHAT_ANSWER = 8, 256, 128
CHAT_SHARE = 0.25  # of the rows of a step
BATCH, CENTROID_BATCH = 64, 24
STEPS, CENTROID_STEPS = 4500, 300
MUON_LR, ADAM_LR, DECAY = 0.015, 3e-3, 0.01
HARD_SHARE = 0.6  # of the loss: cross-entropy with the target's argmax; the rest with its distribution
STEP_WEIGHTS = (1.0, 0.9, 0.8, 0.7)
REACHED_FLOOR = 0.3  # weight of a step that a greedy round would not have reached
GO_ON_SHARE = 0.3  # of the learning rates, where a drafter learns a target that was tuned
CHECKPOINT_SECONDS = 60.0


def own_outputs(model: LanguageModel, corpus: Corpus, batches: int, batch: int, clock: Clock) -> Tensor:
    """Texts that the target wrote behind training prefixes. Shapes: → [batches * batch, LENGTH], int16."""
    rng = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    device = model.embed_tokens.weight.device
    generate = Generator(model, batch, LENGTH, TEMPERATURE, int(batch * SAMPLED_SHARE))
    texts = []
    for number in range(batches):
        size = PROMPT_LENGTHS[number % len(PROMPT_LENGTHS)]
        prompts = torch.from_numpy(corpus.prompts(rng, batch, size)).to(device)
        texts.append(generate(prompts, torch.full((batch,), size, device=device)).to(torch.int16))
        if number in (0, 1) or (number + 1) % 10 == 0:
            print(f"{clock():.0f} s: {(number + 1) * batch * LENGTH / 1e6:.1f} M tokens generated", flush=True)
    return torch.cat(texts)


def own_answers(model: LanguageModel, corpus: Corpus, batches: int, batch: int) -> Tensor:
    """Conversations with the target's own next turn, to its stop token, one after the other in rows.

    Shapes: → [rows, LENGTH], int16.
    """
    rng = np.random.default_rng(SEED + 1)
    device = model.embed_tokens.weight.device
    generate = Generator(model, batch, CHAT_PROMPT + CHAT_ANSWER, TEMPERATURE, int(batch * SAMPLED_SHARE))
    texts = []
    for _ in range(batches):
        prompts, lengths = corpus.chat_prompts(rng, batch, CHAT_PROMPT)
        ids = generate(torch.from_numpy(prompts).to(device), torch.tensor(lengths, device=device)).cpu().numpy()
        for row, begin in zip(ids, lengths, strict=True):
            stops = np.flatnonzero(np.isin(row[begin : begin + CHAT_ANSWER], STOP_IDS))
            texts.append(row[: begin + (int(stops[0]) + 1 if len(stops) else CHAT_ANSWER)])
    flat = np.concatenate([texts[i] for i in rng.permutation(len(texts))]).astype(np.int16)
    return torch.from_numpy(flat[: len(flat) // LENGTH * LENGTH].reshape(-1, LENGTH)).to(device)


def target_view(model: LanguageModel, ids: Tensor) -> tuple[Tensor, dict[str, KeyValue], Tensor]:
    """What the drafter sees and imitates. Shapes: ids [B, T] → hidden [B, T, H], keys and values, logits [B, T, V]."""
    with torch.no_grad():
        hidden, shared = model(ids)
        return hidden, shared, model.logits(hidden).to(torch.bfloat16)


def step_loss(drafter: Drafter, x: Tensor, logits: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
    """One step's loss and where its draft is the target's argmax.

    Shapes: x [B, T, H], logits [B, T, V], reached [B, T] → scalar, [B, T].
    """
    drafts, wanted = drafter.logits(x), logits.float()
    best = wanted.argmax(-1)
    log_q = drafts.log_softmax(-1)
    hard = -log_q.gather(-1, best[..., None])[..., 0]
    soft = -(wanted.softmax(-1) * log_q).sum(-1)
    loss = HARD_SHARE * hard + (1 - HARD_SHARE) * soft
    right = (drafts.argmax(-1) == best).float().detach()
    return (loss * (REACHED_FLOOR + (1 - REACHED_FLOOR) * reached)).mean(), right


def chained_loss(drafter: Drafter, model: LanguageModel, ids: Tensor, judge: StepLoss) -> tuple[Tensor, Tensor]:
    """The loss of a round begun at every position, and the share of drafts that equal the target's argmax.

    Shapes: ids [B, T] → scalar, [steps]. Step j is fed token t + j and judged by the target's logits at t + j.
    """
    hidden, shared, logits = target_view(model, ids)
    starts = ids.shape[1] - STEPS_PER_ROUND
    embedded = model.embed(ids).detach()
    shared = {kind: (k[:, :, :starts], v[:, :, :starts]) for kind, (k, v) in shared.items()}
    state = hidden[:, :starts]
    reached = torch.ones_like(ids[:, :starts], dtype=torch.float32)
    total = torch.zeros((), device=ids.device)
    agreement = []
    for j in range(1, STEPS_PER_ROUND + 1):
        x, state = drafter(embedded[:, j : j + starts], state, shared)
        loss, right = judge(drafter, x, logits[:, j : j + starts], reached)
        total = total + STEP_WEIGHTS[j - 1] * loss
        agreement.append(right.mean())
        reached = reached * right
    return total, torch.stack(agreement)


def centroid_loss(drafter: Drafter, model: LanguageModel, ids: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the centroid scores with the cluster of the dense argmax, and the recall at top-k.

    Shapes: ids [B, T], clusters [V] → scalar, scalar.
    """
    with torch.no_grad():
        hidden, shared, _ = target_view(model, ids)
        embedded = model.embed(ids)
        starts = ids.shape[1] - STEPS_PER_ROUND
        shared = {kind: (k[:, :, :starts], v[:, :, :starts]) for kind, (k, v) in shared.items()}
        state, heads = hidden[:, :starts], []
        for j in range(1, STEPS_PER_ROUND + 1):
            x, state = drafter(embedded[:, j : j + starts], state, shared)
            heads.append(x)
        x = torch.cat(heads)
        dense = drafter.logits(x)
        wanted = clusters[dense.argmax(-1)]
        count = drafter.masked_embedding.centroids.out_features
        mass = torch.zeros(*dense.shape[:-1], count, device=dense.device)
        mass = mass.scatter_add_(-1, clusters.expand_as(dense), dense.softmax(-1))
    scores = drafter.masked_embedding.centroids(x).float()
    loss = F.cross_entropy(scores.flatten(0, -2), wanted.flatten())
    loss = loss + 0.5 * F.cross_entropy(scores.flatten(0, -2), mass.flatten(0, -2))
    hits = (scores.topk(drafter.top_k, -1).indices == wanted[..., None]).any(-1)
    return loss, hits.float().mean()


def main() -> None:
    """Generate, train the dense drafter, cluster its vocabulary, train the centroids, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/nano_data"))
    parser.add_argument("--out", type=Path, default=Path("converter/mtp_export/nano"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--centroid-steps", type=int, default=CENTROID_STEPS)
    parser.add_argument("--generated-batches", type=int, default=GENERATED_BATCHES)
    parser.add_argument("--chat-batches", type=int, default=CHAT_BATCHES)
    parser.add_argument("--generated-batch", type=int, default=GENERATED_BATCH)
    parser.add_argument("--seconds", type=float, default=600.0, help="end the schedule early if it takes longer")
    parser.add_argument("--go-on", action="store_true", help="from the drafter of --out, for a target tuned since")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    clock = Clock()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")

    corpus = Corpus(options.data)
    write_configs(options.out)
    model = load_target(options.out / "target", device).requires_grad_(False)
    texts = own_outputs(model, corpus, options.generated_batches, options.generated_batch, clock)
    answers = own_answers(model, corpus, options.chat_batches, options.generated_batch)
    generated_seconds = clock()
    print(f"{generated_seconds:.0f} s: {answers.numel() / 1e6:.1f} M tokens of chats", flush=True)
    if options.go_on:
        drafter = load_drafter(options.out / "drafter", device)
    else:
        drafter = Drafter(DRAFTER_CONFIG).to(device)
        initialise(drafter, SEED)
    path = options.out / "drafter/model.safetensors"

    judge: StepLoss = step_loss
    if not options.no_compile:
        compile_layers(model)
        compile_layers(drafter)
        judge = torch.compile(step_loss, dynamic=False)

    generator = torch.Generator().manual_seed(SEED)

    def sample(count: int) -> Tensor:
        chats = int(count * CHAT_SHARE)
        rows = [
            pool[torch.randint(len(pool), (share,), generator=generator).to(device)]
            for pool, share in ((texts, count - chats), (answers, chats))
        ]
        return torch.cat(rows).long()

    share = GO_ON_SHARE if options.go_on else 1.0
    optimiser = Optimiser(drafter, share * MUON_LR, share * ADAM_LR, DECAY)
    losses: list[Tensor] = []
    shares: list[Tensor] = []
    saved, step = clock(), 0
    budget = Budget(options.steps, options.seconds)
    for step in range(options.steps):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, agreement = chained_loss(drafter, model, sample(BATCH), judge)
        loss.backward()  # type: ignore[no-untyped-call]
        done = budget.progress(step + 1)
        optimiser.step(schedule(step, done))
        losses.append(loss.detach())
        shares.append(agreement.detach())
        if (step + 1) % 200 == 0 or done >= 1 or step in (4, 24):
            per_step = " ".join(f"{value:.3f}" for value in torch.stack(shares).mean(0).tolist())
            print(f"{clock():.0f} s: step {step + 1}, loss {mean(losses):.4f}, agreement {per_step}", flush=True)
            losses.clear()
            shares.clear()
            if clock() - saved > CHECKPOINT_SECONDS:
                save_drafter(drafter, path)
                saved = clock()
        if done >= 1:
            break
    dense_seconds = clock() - generated_seconds

    if not options.go_on:
        rows = drafter.model.embed_tokens.weight.detach().float()
        count = drafter.masked_embedding.centroids.out_features
        ordering = balanced_clusters(rows.cpu(), count, SEED).to(device)
        drafter.masked_embedding.token_ordering.copy_(ordering)
        with torch.no_grad():
            drafter.masked_embedding.centroids.weight.copy_(cluster_means(rows, ordering, count))
    clusters = drafter.clusters_of_tokens()
    print(f"{clock():.0f} s: clustered", flush=True)
    drafter.requires_grad_(False)
    drafter.masked_embedding.centroids.requires_grad_(True)
    centroids = torch.optim.AdamW(drafter.masked_embedding.centroids.parameters(), lr=5e-3, weight_decay=0.0)
    recalls: list[Tensor] = []
    for number in range(options.centroid_steps):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, recall = centroid_loss(drafter, model, sample(CENTROID_BATCH), clusters)
        loss.backward()  # type: ignore[no-untyped-call]
        centroids.param_groups[0]["lr"] = 5e-3 * schedule(number, (number + 1) / options.centroid_steps, warm_up=20)
        centroids.step()
        centroids.zero_grad()
        recalls.append(recall.detach())
        if (number + 1) % 100 == 0:
            print(f"{clock():.0f} s: centroids step {number + 1}, recall {mean(recalls[-100:]):.4f}", flush=True)
    save_drafter(drafter, path)
    log = {
        "generated_tokens": int(texts.numel() + answers.numel()),
        "generation_seconds": generated_seconds,
        "steps": step + 1,
        "positions": (step + 1) * BATCH * (LENGTH - STEPS_PER_ROUND),
        "dense_seconds": dense_seconds,
        "seconds": clock(),
        "hardware": hardware(device),
    }
    name = "tune_drafter.json" if options.go_on else "train_drafter.json"
    (options.out / name).write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
