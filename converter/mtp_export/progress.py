"""What long work reports to whoever watches it."""

from __future__ import annotations

import time
from typing import Protocol


class Progress(Protocol):
    """Watches an export: a stage of so many units, and units that are done; of bytes, whose they are."""

    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None: ...

    def advance(self, done: int, name: str = "") -> None: ...


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
