"""Keeping LiteRT's log off the user's screen.

ai-edge-litert 2.3.0 prints INFO and WARNING lines straight to file descriptor 2 and has no public way to stop it (its
issue 7420), so the descriptor itself is turned away while the library opens and closes. Its lines are kept: an error
message may quote them. Set MTP_NATIVE_LOG=1 to see everything.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

_SHOW = "MTP_NATIVE_LOG"
_STDERR = 2


class NativeLog:
    """What was written to file descriptor 2 while it was turned away."""

    def __init__(self, file: BinaryIO | None) -> None:
        """Take the file it goes to, or None where nothing is held back."""
        self._file = file

    def text(self) -> str:
        """Return everything held back so far."""
        if self._file is None:
            return ""
        self._file.seek(0)
        return self._file.read().decode("utf-8", errors="replace")

    def last_error(self) -> str:
        """Return the last line that the library marked as an error, in parentheses, or nothing."""
        errors = [line.strip() for line in self.text().splitlines() if line.startswith("ERROR")]
        return f"({errors[-1]})" if errors else ""


@contextlib.contextmanager
def native_log_held_back() -> Iterator[NativeLog]:
    """Turn file descriptor 2 away from the screen for a block. It holds for the whole process: keep the block short."""
    if os.environ.get(_SHOW):
        yield NativeLog(None)
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        screen = os.dup(_STDERR)
    except OSError:
        # No standard error at all: nothing to protect.
        yield NativeLog(None)
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), _STDERR)
        try:
            yield NativeLog(file)
        finally:
            os.dup2(screen, _STDERR)
            os.close(screen)


def hold_back_native_log_at_exit() -> None:
    """Turn file descriptor 2 away when the interpreter ends, for the lines of the library's static destructors."""
    if not os.environ.get(_SHOW):
        atexit.unregister(_turn_away)
        atexit.register(_turn_away)


def _turn_away() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDERR)
    os.close(nowhere)
