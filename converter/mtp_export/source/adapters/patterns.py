"""Regular expressions of a stranger: of bounded length and size, and matched for a bounded time.

PEFT matches names of modules with Python's `re`, which some patterns keep busy for ever. Here a pattern has to be one
of `re` too, and is matched by the package `regex`, which gives up after a time.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import regex

from mtp_export.arch.json_object import shortened
from mtp_export.errors import CheckpointError

MAX_CHARACTERS = 200_000  # of all patterns of an adapter: a pattern for each module of the largest model has 30,000
_MAX_REPEATS = 10_000  # the product of a pattern's counts: regex unrolls them when it compiles
_COUNT = re.compile(r"\{0*(\d*)(?:,0*(\d*))?\}")
SECONDS = 5.0  # for all matches of an adapter, of which there are some 100,000 at most


@dataclasses.dataclass(kw_only=True)
class Patterns:
    """The patterns of one adapter, which share a budget of characters and of time.

    Args:
        where: the file that they come from, for errors.
    """

    where: str
    seconds: float
    _characters: int = 0

    def compiled(self, key: str, pattern: str, *, whole: bool) -> Callable[[str], bool]:
        """Return whether `pattern` matches a name from its beginning.

        Args:
            key: what the adapter's config calls it, for errors.
            whole: it has to match to the end, too.

        Raises:
            CheckpointError: it is no pattern, or too large; the function it returns: matching takes too long.
        """
        expression = self._expression(key, pattern)
        match = expression.fullmatch if whole else expression.match
        return lambda name: self._timed(key, pattern, lambda seconds: match(name, timeout=seconds)) is not None

    def numbered(self, key: str, pattern: str) -> Callable[[str], int | None]:
        """Return the number that the group `idx` of a pattern has in a name.

        Raises:
            CheckpointError: as of `compiled`, or the group matches no number.
        """
        expression = self._expression(key, pattern)

        def number(name: str) -> int | None:
            match = self._timed(key, pattern, lambda seconds: expression.match(name, timeout=seconds))
            if match is None:
                return None
            if not (digits := match["idx"]) or not digits.isdecimal() or len(digits) > 9:
                raise CheckpointError(f"{self.where}: {key} has {shortened(pattern)}, which gives no numbers of layers")
            return int(digits)

        return number

    def _expression(self, key: str, pattern: str) -> Any:
        self._characters += len(pattern)
        counts = [max(int(n[:9]) for n in pair if n) for pair in _COUNT.findall(pattern[:MAX_CHARACTERS]) if any(pair)]
        if self._characters > MAX_CHARACTERS or math.prod(counts) > _MAX_REPEATS:
            raise CheckpointError(f"{self.where}: {key} has regular expressions that are too large: list module names")
        if re.search(r"\{(?!\d*,?\d*\})", pattern):  # fuzzy in `regex`, and a character like others in `re`
            raise CheckpointError(
                f"{self.where}: {key} has {shortened(pattern)}, with a brace that is no count: list module names"
            )
        try:
            re.compile(pattern)
            return regex.compile(pattern)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{self.where}: {key} has {shortened(pattern)}, which is no regular expression "
                f"({shortened(str(error))[1:-1]})"
            ) from error

    def _timed(self, key: str, pattern: str, match: Callable[[float], Any]) -> Any:
        start = time.monotonic()
        try:
            if self.seconds <= 0:
                raise TimeoutError
            result = match(self.seconds)
        except TimeoutError:
            raise CheckpointError(
                f"{self.where}: matching {shortened(pattern)} of {key} takes too long: list module names instead"
            ) from None
        self.seconds -= time.monotonic() - start
        return result
