"""Batched generation with the target over a static cache; on a GPU one step is a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tools.train_nano.model import LanguageModel


class Generator:
    """Continues `batch` sequences at once to `length` tokens in all."""

    def __init__(self, model: LanguageModel, batch: int, length: int, temperature: float, sampled: int) -> None:
        """The last `sampled` rows of a batch are sampled at `temperature`; the others are greedy."""
        self.model, self.length = model, length
        device = model.embed_tokens.weight.device
        self.device = device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.caches = model.new_caches(batch, length, dtype)
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.next = torch.zeros(batch, dtype=torch.long, device=device)
        self.temperature, self.sampled = temperature, sampled
        self._run: Callable[[], None] = self._step
        if device.type == "cuda":
            self._run = self._captured()

    def _step(self) -> None:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = self.model.step(self.ids, self.position, self.caches)
            logits = self.model.logits(hidden[:, 0])
        self.next.copy_(logits.argmax(-1))
        if self.sampled:
            noise = -torch.empty_like(logits[-self.sampled :]).exponential_().log()
            self.next[-self.sampled :] = (logits[-self.sampled :] / self.temperature + noise).argmax(-1)

    def _captured(self) -> Callable[[], None]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            self._step()
        return graph.replay

    @torch.no_grad()
    def __call__(self, prompts: Tensor, lengths: Tensor) -> Tensor:
        """Shapes: prompts [B, P] (rows valid up to lengths [B]) → [B, length], prompts included."""
        out = torch.zeros(len(prompts), self.length, dtype=torch.long, device=self.device)
        out[:, : prompts.shape[1]] = prompts
        for t in range(self.length - 1):
            self.position.fill_(t)
            self.ids.copy_(out[:, t : t + 1])
            self._run()
            out[:, t + 1] = torch.where(lengths > t + 1, out[:, t + 1], self.next)
        return out
