"""A Python module of this package run in a process of its own: a request goes in, a result comes back, as JSON.

For what may crash, hang, take all memory or write to file descriptor 2 itself. `run_child` is the parent's side. The
module ends with `if __name__ == "__main__": answer_parent(Request, handle)`, which is the child's.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

_Request = TypeVar("_Request")
_Result = TypeVar("_Result")


class ChildTimeoutError(Exception):
    """The child did not end within its time."""


class ChildFailedError(Exception):
    """The child ended without a result. `log` is all that it wrote to standard error; a negative `exit_code` is the
    signal that killed it."""

    def __init__(self, exit_code: int, log: str) -> None:
        """Take the exit code and the log."""
        super().__init__(exit_code, log)
        self.exit_code, self.log = exit_code, log

    @property
    def last_line(self) -> str:
        """The last line of the log: of a traceback, the error. Empty if there is no log."""
        return self.log.strip().rpartition("\n")[2]


def run_child(
    module: str,
    request: Any,
    result_type: type[_Result],
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> tuple[_Result, str]:
    """Run `python -P -m module` on a request, with some variables of the environment changed.

    `-P` keeps the current folder out of the child's imports.

    Returns:
        The result, and all that the child wrote to standard error.

    Raises:
        ChildTimeoutError: it did not end within `timeout_s`, and was killed.
        ChildFailedError: it ended with an error, or without a result.
    """
    with tempfile.TemporaryDirectory(prefix="mtp-child-") as folder:
        result_path = Path(folder) / "result.json"
        try:
            process = subprocess.run(
                [sys.executable, "-P", "-m", module, str(result_path)],
                input=msgspec.json.encode(request),
                capture_output=True,
                timeout=timeout_s,
                check=False,
                env={**os.environ, **(environment or {})},
            )
        except subprocess.TimeoutExpired:
            raise ChildTimeoutError(timeout_s) from None
        log = process.stderr.decode("utf-8", errors="replace")
        if process.returncode != 0 or not result_path.exists():
            raise ChildFailedError(process.returncode, log)
        return msgspec.json.decode(result_path.read_bytes(), type=result_type), log


def answer_parent(request_type: type[_Request], handle: Callable[[_Request, Path], object]) -> None:
    """Read the parent's request, handle it and write the result.

    `handle` also gets a folder that the parent removes, even if the child is killed.
    """
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=request_type)
    result_path = Path(sys.argv[1])
    result_path.write_bytes(msgspec.json.encode(handle(request, result_path.parent)))


def limit_memory(limit_bytes: int) -> None:
    """Limit the address space of this process: a chat template may ask for any amount."""
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
