"""Reading a stranger's text files: nothing is read that has no end, is too large, or is a pointer to something else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

from mtp_export.errors import CheckpointError

_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFile:
    """A text file that is to be read, and the words of its errors.

    Attributes:
        kind: what the file should be.
        prefix: what every error begins with.
        missing: said of a file that is not there.
        damaged: what a folder or pipe in its place means; may be empty.
        remedy: what to do about a file that cannot be read; may be empty.
    """

    path: Path
    max_bytes: int
    kind: str
    missing: str
    prefix: str = ""
    damaged: str = ""
    remedy: str = ""

    def read(self) -> str:
        """Return the text.

        Raises:
            CheckpointError: it is missing, no file, too large, a git-LFS pointer, or not UTF-8.
        """
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device has no end
                raise self._error(f"{self.path} is not a file", self.damaged)
            if status.st_size > self.max_bytes:
                raise self._error(f"{self.path} is larger than {self.max_bytes >> 20} MiB", f"this is no {self.kind}")
            refuse_pointer(self.path)
            return self.path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            raise self._error(f"{self.path} is missing", self.missing) from None
        except OSError as error:
            raise self._error(f"cannot read {self.path}: {error.strerror}", self.remedy) from error
        except UnicodeDecodeError:
            raise self._error(f"{self.path} is no UTF-8 text", self.remedy) from None

    def read_json(self) -> Any:
        """Parse the text as JSON.

        Raises:
            CheckpointError: as of `read`, or it is not JSON.
        """
        text = self.read()
        if text.startswith("\ufeff"):  # transformers does not read it either
            raise self._error(f"{self.path} begins with a byte order mark", "save it as UTF-8 without one")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also for integers of thousands of digits
            raise self._error(f"{self.path} is not JSON ({error})", self.remedy) from error

    def _error(self, fault: str, remedy: str) -> CheckpointError:
        return CheckpointError(": ".join(part for part in (f"{self.prefix}{fault}", remedy) if part))


def refuse_pointer(path: Path) -> None:
    """Look whether a file that is no use is a git-LFS pointer to what it should be.

    Raises:
        CheckpointError: it is.
    """
    content = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        content = file.read(len(_POINTER))
    if content == _POINTER:
        raise CheckpointError(
            f"{path} is a git-LFS pointer, not the file itself: run `git lfs pull`, or download it again"
        )
