"""The loop that all training stages share, and their common options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tools.train_nano.training import Budget, Clock, Optimiser, mean, schedule

_LOG_EVERY = 200  # steps
_ALSO_LOGGED = (4, 24)  # to see early that a run goes well


def training_options(description: str | None, *, steps: int, seconds: float) -> argparse.ArgumentParser:
    """Return a parser with the options that every stage has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path("build/nano_data"))
    parser.add_argument("--out", type=Path, default=Path("converter/mtp_export/nano"))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seconds", type=float, default=seconds, help="end the schedule early if it takes longer")
    return parser


def training_device() -> torch.device:
    """Return the GPU if there is one, with fast matrix products in float32."""
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A run of training steps.

    Attributes:
        warm_up: steps until the full learning rate.
        save: writes a checkpoint of the model, every `save_seconds` at the earliest.
    """

    optimiser: Optimiser
    budget: Budget
    clock: Clock
    device: torch.device
    warm_up: int = 150
    save: Callable[[], None] = lambda: None
    save_seconds: float = float("inf")

    def run(self, loss_of_batch: Callable[[], Tensor], note: Callable[[], str] = lambda: "") -> int:
        """Train until the budget is spent and return the number of steps.

        Args:
            loss_of_batch: draws a batch and returns its loss, a scalar.
            note: returns what a line of the log says beside the loss.
        """
        losses: list[Tensor] = []
        saved, step = self.clock(), 0
        for step in range(self.budget.steps):
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = loss_of_batch()
            loss.backward()  # type: ignore[no-untyped-call]
            progress = self.budget.progress(step + 1)
            self.optimiser.step(schedule(step, progress, warm_up=self.warm_up))
            losses.append(loss.detach())
            if (step + 1) % _LOG_EVERY == 0 or progress >= 1 or step in _ALSO_LOGGED:
                print(f"{self.clock():.0f} s: step {step + 1}, loss {mean(losses):.4f}{note()}", flush=True)
                losses.clear()
                if self.clock() - saved > self.save_seconds:
                    self.save()
                    saved = self.clock()
            if progress >= 1:
                break
        return step + 1
