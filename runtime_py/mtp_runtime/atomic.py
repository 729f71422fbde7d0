"""Files that are either as they were or complete: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

_NAME_LENGTH = 48  # of the file's own name that the one beside it repeats: a name may have 255 bytes in all


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file at; it takes the place of `path` when the block ends.

    If the block fails, `path` stays as it was and the file beside it is removed. A process that is killed leaves
    `.NAME.partial-RANDOM` there. Two writers do not disturb each other; the last to finish wins.

    Raises:
        OSError: the file cannot be renamed, or what the block raises.
    """
    beside = path.with_name(f".{path.name[:_NAME_LENGTH]}.partial-{secrets.token_hex(4)}")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file by `content`, text as UTF-8; whoever reads `path` sees the old file or the new one.

    Raises:
        OSError: the folder is missing or cannot be written, or the disk is full; `path` is as it was.
    """
    with replacing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
