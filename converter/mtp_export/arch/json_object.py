"""Values of a JSON object, each checked for its type, with the place named in every error."""

from __future__ import annotations

import reprlib
from typing import Any

from mtp_export.errors import CheckpointError

_REPR = reprlib.Repr()  # of what a file says: enough to find it there, whatever it is
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxtuple = 64  # layer types of a spec, all of them

_MAX_NUMBER = 1e30


def shortened(value: Any) -> str:
    """Show a value of a file, at a length that fits into a line."""
    return _REPR.repr(value)


class JsonObject:
    """An object of a file; `where` names it in errors."""

    def __init__(self, values: Any, where: str) -> None:
        """Raises:
        CheckpointError: it is no object.
        """
        if not isinstance(values, dict):
            raise CheckpointError(f"{where}: expected an object, got {type(values).__name__}")
        self.values, self.where = values, where

    def fail(self, key: str, got: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {shortened(got)}, expected {expected}")

    def child(self, key: str) -> JsonObject:
        if key not in self.values:
            raise CheckpointError(f"{self.where}: {key} is missing: this is not a Gemma 4 checkpoint, or a damaged one")
        return JsonObject(self.as_kind(key, self.values[key], dict), f"{self.where}: {key}")

    def as_kind(self, key: str, value: Any, kind: type) -> Any:
        """Return `value`, which `key` has, if it is of a kind, and no other: true is no number."""
        if type(value) is not kind:
            raise self.fail(key, value, f"a value of type {kind.__name__}")
        return value

    def as_number(self, key: str, value: Any) -> float:
        """Return a finite number, with a decimal point or without."""
        number = value if type(value) is int else self.as_kind(key, value, float)
        if not abs(number) < _MAX_NUMBER:  # NaN, which JSON files may hold, is not less than anything
            raise self.fail(key, value, "a finite number")
        return float(number)

    def as_size(self, key: str, value: Any) -> int:
        size: int = self.as_kind(key, value, int)
        if not 0 < size < 2**31:
            raise self.fail(key, value, "a positive size")
        return size
