"""Text that ends where a stop sequence begins, read token by token."""

from __future__ import annotations

from collections.abc import Sequence

from mtp_runtime.errors import UserError
from mtp_runtime.text.tokenizer import TextStream


def check_stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return the stop sequences as a tuple.

    Raises:
        UserError: one of them is empty or no text.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(one, str) and one for one in stops):
        raise UserError(f"stop is {stops!r}: give texts of at least one character")
    return stops


class StoppingText:
    """The text of the tokens of one generation, up to the first place where one of `stops` begins.

    What may still become a stop sequence is held back. It looks at text, so a stop sequence counts wherever token
    boundaries fall, and special tokens, which have no text, cannot be part of one.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str]) -> None:
        """Take a fresh stream."""
        self.reached: str | None = None
        self._stream = stream
        self._stops = tuple(stops)
        self._released: list[str] = []
        self._held = ""

    @property
    def text(self) -> str:
        """All text so far, what is held back included, a stop sequence and what came after it not."""
        return "".join(self._released) + self._held

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is certain by now."""
        return self._take(self._stream.push(token_id), final=False)

    def finish(self) -> str:
        """Return what is still held back: no token follows."""
        return self._take(self._stream.finish(), final=True)

    def _take(self, more: str, *, final: bool) -> str:
        if self.reached is not None:
            return ""
        self._held += more
        places = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            end, self.reached = min(places)
            released, self._held = self._held[:end], ""
        else:
            end = len(self._held) if final else self._certain()
            released, self._held = self._held[:end], self._held[end:]
        self._released.append(released)
        return released

    def _certain(self) -> int:
        """Return how much of the held text cannot be the beginning of a stop sequence."""
        longest = max(map(len, self._stops), default=1)
        for start in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return len(self._held)
