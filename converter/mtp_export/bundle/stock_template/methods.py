"""Constants, and calls of Python's methods, as MiniJinja reads them. Values and arguments are texts of expressions."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtp_export.errors import CheckpointError

# What str.strip() takes away in Python; Rust's trim leaves the four separators \x1c to \x1f.
WHITESPACE = "".join(chr(c) for c in range(0x110000) if chr(c).isspace())


def literal(value: Any) -> str:
    """Return a constant as MiniJinja reads it.

    Raises:
        CheckpointError: it cannot be written.
    """
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise CheckpointError("the chat template has half of a surrogate pair in a text: correct it")
        return (
            json.dumps(value, ensure_ascii=False)
            .replace("\x7f", "\\u007f")
            .replace(".", "\\u002e")
            .replace("%", "\\u0025")
        )
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(literal(item) for item in value)}]"
    if isinstance(value, int | float) and math.isfinite(value):
        return repr(value)
    raise CheckpointError(f"the chat template has the constant {value!r}, which LiteRT-LM cannot read")


def _get(value: str, key: str, default: str = "none") -> str:
    return f"({value}[{key}] if {value}[{key}] is defined else {default})"


def _strip(name: str) -> Callable[..., str]:
    def write(value: str, characters: str | None = None) -> str:
        return f"({value} | {name}({characters or literal(WHITESPACE)}))"

    return write


def _split(value: str, separator: str | None = None, most: str | None = None) -> str | None:
    if separator in (None, "none"):
        spaced = "".join(f" | replace({literal(chr(c))}, ' ')" for c in range(0x1C, 0x20))
        return f"({value}{spaced} | split | list)" if most is None else None
    return f"({value} | split({separator}{'' if most in (None, '-1', '(-1)') else f', {most}'}) | list)"


def _rsplit(value: str, separator: str, most: str) -> str | None:
    """Only the last place is split at, which is what reasoning models' templates do."""
    if separator == "none":
        return None
    parts = _split(value, separator)
    parted = f"[{parts}[:-1] | join({separator}), {parts}[-1]]"
    return f"({parted} if {separator} in {value} else [{value}])" if most == "1" else None


def _replace(value: str, old: str, new: str, count: str | None = None) -> str:
    if count is None:
        return f"({value} | replace({old}, {new}))"
    return f"({_split(value, old, count)} | join({new}))"


def _find(value: str, part: str) -> str:
    return f"(({_split(value, part, '1')}[0] | length) if {part} in {value} else -1)"


# How a call of a method is written, by its name; None where its arguments have no counterpart.
_METHODS: Mapping[str, Callable[..., str | None]] = {
    "get": _get,
    "items": lambda value: f"({value} | items)",
    "keys": lambda value: f"({value} | list)",
    "values": lambda value: f"({value} | items | map('last') | list)",
    "strip": _strip("trim"),
    "lstrip": _strip("lstrip"),
    "rstrip": _strip("rstrip"),
    "startswith": lambda value, start: None if start.startswith("[") else f"({value} is startingwith({start}))",
    "endswith": lambda value, end: None if end.startswith("[") else f"({value} is endingwith({end}))",
    "split": _split,
    "rsplit": _rsplit,
    "replace": _replace,
    "upper": lambda value: f"({value} | upper)",
    "lower": lambda value: f"({value} | lower)",
    "capitalize": lambda value: f"({value} | capitalize)",
    "join": lambda value, parts: f"({parts} | join({value}))",
    "find": _find,
    "count": lambda value, part: f"(({_split(value, part)} | length) - 1)",
    "removeprefix": lambda value, part: (
        f"({value}[({part} | length):] if ({value} is startingwith({part})) else {value})"
    ),
    "removesuffix": lambda value, part: (
        f"({value}[:(({value} | length) - ({part} | length))] if ({value} is endingwith({part})) else {value})"
    ),
}
TEXT_METHODS = frozenset(
    [
        *("strip", "lstrip", "rstrip", "replace", "upper", "lower", "capitalize", "join", "removeprefix"),
        "removesuffix",
    ]
)


def written_call(name: str, value: str, arguments: Sequence[str]) -> str | None:
    """Return a call of a method as an expression; None if it has no counterpart with these arguments."""
    writer = _METHODS.get(name)
    return writer(value, *arguments) if writer is not None and _takes(writer, 1 + len(arguments)) else None


def _takes(writer: Callable[..., object], count: int) -> bool:
    """Return whether a function takes so many arguments."""
    try:
        inspect.signature(writer).bind(*range(count))
    except TypeError:
        return False
    return True
