"""What the training scripts share: the token stream, the optimiser and the learning-rate schedule."""

from __future__ import annotations

import io
import json
import lzma
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tools.train_nano.nano_ids import BOS, RESPONSE_CLOSE, RESPONSE_OPEN, TURN_OPEN

PROSE_REPEATS = 1.5  # times that prose is seen per epoch; there is half as much of it as of code
CODE_PROMPTS = 0.55  # of the texts that the target writes outside chats, the share that goes on with code


class Corpus:
    """The training documents, each beginning with BOS: code, then prose, then chat."""

    def __init__(self, folder: Path) -> None:
        """Read what `prepare_data.py` wrote."""
        parts: list[NDArray[np.uint16]] = []
        for kind in ("code", "prose", "chat"):
            raw = lzma.decompress((folder / f"train_{kind}.npy.xz").read_bytes())
            parts.append(np.load(io.BytesIO(raw)))
        self.counts = [int((part == BOS).sum()) for part in parts]
        self.tokens = np.concatenate(parts)
        self.starts = np.flatnonzero(self.tokens == BOS)
        self.ends = np.append(self.starts[1:], len(self.tokens))
        self.model_turn: list[int] = json.loads((folder / "layout.json").read_text())["model_turn"]

    def epoch(self, rng: np.random.Generator) -> NDArray[np.uint16]:
        """One pass in random order, prose repeated."""
        order = np.arange(len(self.starts))
        prose = order[self.counts[0] : self.counts[0] + self.counts[1]]
        extra = rng.permutation(prose)[: int(len(prose) * (PROSE_REPEATS - 1))]
        order = rng.permutation(np.concatenate([order, extra]))
        return np.concatenate([self.tokens[self.starts[i] : self.ends[i]] for i in order])

    def rows(self, rng: np.random.Generator) -> Iterator[tuple[NDArray[np.uint16], int]]:
        """Endless epochs as flat streams with their number."""
        number = 0
        while True:
            yield self.epoch(rng), number
            number += 1

    def prompts(self, rng: np.random.Generator, count: int, length: int) -> NDArray[np.int64]:
        """Beginnings of code and prose, and inner parts of the longer ones, behind BOS. Shapes: → [count, length]."""
        code, prose = self.counts[:2]
        picked = np.empty((count, length), dtype=np.int64)
        for row in range(count):
            document = rng.integers(0, code) if rng.random() < CODE_PROMPTS else code + rng.integers(0, prose)
            start, size = int(self.starts[document]), int(self.ends[document] - self.starts[document])
            if rng.random() < 0.5 and size > 2 * length:
                start += int(rng.integers(0, size - length))
            start = min(start, len(self.tokens) - length)
            picked[row] = self.tokens[start : start + length]
        picked[:, 0] = BOS
        return picked

    def chat_prompts(self, rng: np.random.Generator, count: int, width: int) -> tuple[NDArray[np.int64], list[int]]:
        """Conversations up to where the model speaks: begins its turn, or goes on after a tool's answer.

        Shapes: → [count, width], of each row as many as the second says.
        """
        first = sum(self.counts[:2])
        picked = np.zeros((count, width), dtype=np.int64)
        lengths: list[int] = []
        while len(lengths) < count:
            document = first + rng.integers(0, self.counts[2])
            ids = self.tokens[self.starts[document] : self.ends[document]]
            ends = [i + len(self.model_turn) for i in np.flatnonzero(ids == TURN_OPEN)]
            ends = [end for end in ends if ids[end - len(self.model_turn) : end].tolist() == self.model_turn]
            ends += [i + 1 for i in np.flatnonzero(ids[:-1] == RESPONSE_CLOSE) if ids[i + 1] != RESPONSE_OPEN]
            ends = [end for end in ends if end <= width]
            if ends:
                end = int(rng.choice(ends))
                picked[len(lengths), :end] = ids[:end]
                lengths.append(end)
        return picked, lengths


class Muon:
    """Orthogonalised momentum for matrices, stacked by shape (Jordan et al. 2024)."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, decay: float, momentum: float = 0.95) -> None:
        self.base_lr, self.lr, self.decay, self.momentum = lr, lr, decay, momentum
        self.groups: dict[tuple[int, ...], list[Tensor]] = {}
        for matrix in matrices:
            self.groups.setdefault(tuple(matrix.shape), []).append(matrix)
        self.buffers = {s: torch.zeros((len(g), *s), device=g[0].device) for s, g in self.groups.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix from its gradient."""
        for shape, group in self.groups.items():
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            buffer = self.buffers[shape]
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(buffer, self.momentum))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_mul_(group, 1 - self.lr * self.decay)
            torch._foreach_add_(group, list(update.to(group[0].dtype).unbind()), alpha=-self.lr * scale)


def orthogonalise(x: Tensor) -> Tensor:
    """Five Newton–Schulz steps towards the nearest orthogonal matrix. Shapes: [N, rows, columns] → same."""
    x = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Optimiser:
    """Muon for the layers' matrices, AdamW for tables, norms and small rest."""

    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float, decay: float) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if p.ndim == 2 and "embed_tokens" not in n and "centroids" not in n]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.muon = Muon(matrices, muon_lr, decay)
        fused = next(iter(model.parameters())).is_cuda
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        self.adam_lr = adam_lr

    def step(self, factor: float) -> None:
        """Apply the gradients at `factor` times the base learning rates, then clear them."""
        self.muon.lr = self.muon.base_lr * factor
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * factor
        self.muon.step()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for group_ in self.muon.groups.values():
            for parameter in group_:
                parameter.grad = None


def schedule(step: int, progress: float, warm_up: int = 150) -> float:
    """Linear warm-up, then half a cosine over `progress` 0..1, to 1 % of the base rate."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Budget:
    """How much of a training run is done: by steps, or by time if that runs out first."""

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds, self.start = steps, seconds, time.monotonic()

    def progress(self, step: int) -> float:
        """0 at the beginning, 1 or more when the run has to end."""
        return max(step / self.steps, (time.monotonic() - self.start) / self.seconds)


def initialise(model: nn.Module, seed: int) -> None:
    """Normal matrices (0.02 for tables, 1/sqrt(fan-in) halved for the rest), from a fixed seed."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02 if "embed_tokens" in name else 0.5 * parameter.shape[1] ** -0.5)


def hardware(device: torch.device) -> str:
    """Return the name of what trained the pair, for its model card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Clock:
    """Seconds since the start, for the log and the model card."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self.start


def mean(values: Iterable[Tensor]) -> float:
    """Return the mean of scalar tensors, read from the device once."""
    return float(torch.stack(list(values)).mean())
