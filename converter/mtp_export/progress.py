"""What long work reports to whoever watches it."""

from __future__ import annotations

import time
from typing import Protocol

_LEAST_S = 1e-3


class Progress(Protocol):
    """Watches an export: a stage of so many units, and units that are done; of bytes, whose they are."""

    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None:
        """Begin a stage of `total` units, 0 where they are not known."""

    def advance(self, done: int, name: str = "") -> None:
        """Count units of the stage as done."""


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a stage; one that took no time is left out."""
        now = time.perf_counter()
        if now - self._last >= _LEAST_S:
            self.laps[name] = round(now - self._last, 3)
        self._last = now
