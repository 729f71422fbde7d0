"""Passes that several sequences share: each waits in a thread of its own, and one pass serves all that wait.

Which sequences meet in a pass changes only how long it takes. A pass starts once everyone waits who did when the last
one started, or nothing has happened for PATIENCE_S: a sequence that has ended, or whose reader is slow, holds up the
others no longer than that, and is expected again once it comes back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mtp_runtime.errors import BackendError, MtpError

PATIENCE_S = 0.005

Runner = Callable[[Mapping[int, Any]], Mapping[int, Any]]


class SharedPasses:
    """Runs the work of many sequences together, kind by kind."""

    def __init__(self, runners: Mapping[type, Runner]) -> None:
        """Take a runner for each kind of work, which maps works to results by the number of their sequence.

        Where several kinds wait, the first one is run first.
        """
        self._runners = dict(runners)
        self._turn = threading.Condition()
        self._waiting: dict[int, Any] = {}
        self._done: dict[int, Any] = {}
        self._expected: set[int] = set()
        self._last_event = 0.0
        self._busy = False

    def run(self, sequence: int, work: object) -> Any:
        """Return the result of `work`, once a pass has served it.

        Raises:
            MtpError: the error of the pass, in every sequence that it served.
        """
        with self._turn:
            self._done.pop(sequence, None)
            self._waiting[sequence] = work
            self._expected.add(sequence)
            self._last_event = time.monotonic()
            try:
                while sequence not in self._done:
                    patience = self._last_event + PATIENCE_S - time.monotonic()
                    if self._busy:
                        self._turn.wait()
                    elif self._expected <= self._waiting.keys() or patience <= 0.0:
                        self._serve()
                    else:
                        self._turn.wait(patience)
            finally:
                self._waiting.pop(sequence, None)
            result = self._done.pop(sequence)
        if isinstance(result, MtpError):
            raise result
        return result

    def _serve(self) -> None:
        """Run one pass for all that wait for its kind, while others may come and wait for the next."""
        self._expected = set(self._waiting)
        kinds = {type(work) for work in self._waiting.values()}
        kind = next(kind for kind in self._runners if kind in kinds)
        served = {sequence: work for sequence, work in self._waiting.items() if isinstance(work, kind)}
        for sequence in served:
            del self._waiting[sequence]
        # The result of the others if this thread is interrupted in the middle.
        results: Mapping[int, Any] = dict.fromkeys(served, BackendError("the pass was interrupted: generate again"))
        self._busy = True
        self._turn.release()
        try:
            results = self._runners[kind](served)
        except MtpError as error:
            results = dict.fromkeys(served, error)
        finally:
            self._turn.acquire()
            self._busy = False
            self._done.update(results)
            self._last_event = time.monotonic()
            self._turn.notify_all()
