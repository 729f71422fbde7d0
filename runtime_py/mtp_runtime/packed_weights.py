"""Weights in the order that this processor's kernels read them, in files that every process maps.

XNNPACK packs weights when a graph is compiled: without a file for every signature anew, and in memory that nothing can
take back (E2B at int4: 8.3 GB). With one, they are packed once, at the first start, and mapped from then on.
XNNPACK looks a weight up by its place in the graph, not by its value. So a file is named by all that decides what lies
where: the graph, the library's version and the processor.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

from mtp_runtime.contract import FileEntry
from mtp_runtime.user_cache import user_cache

_SUFFIX = ".xnnpack_cache"
_UNUSED_S = 30 * 86400.0  # after which a file is removed
_ROOM = 1.5  # bytes that packed weights may take for each byte of a graph


class PackedWeights:
    """The file of one graph's packed weights: one that is there, or a new one that `keep` gives its name."""

    def __init__(self, folder: Path, graph: FileEntry) -> None:
        """Choose the file; there is none if the folder cannot be written or its disk has no room."""
        self._final = folder / f"{_name(graph)}{_SUFFIX}"
        self._new = self._final.with_name(f".{os.getpid()}-{time.monotonic_ns()}{_SUFFIX}")
        self.path: Path | None = None
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if self._final.exists():
                os.utime(self._final)  # it is in use
                self.path = self._final
            elif shutil.disk_usage(folder).free > _ROOM * graph.size_bytes and os.access(folder, os.W_OK):
                _tidy(folder)
                self.path = self._new

    def keep(self) -> None:
        """Give a new file its name, now that it is complete; what maps it does not notice."""
        with contextlib.suppress(OSError):
            if self.path == self._new:
                self._new.rename(self._final)

    def discard(self) -> None:
        """Remove a new file that was not kept."""
        with contextlib.suppress(OSError):
            self._new.unlink()


def default_folder() -> Path:
    """The folder `packed` of the user's cache."""
    return user_cache() / "packed"


def _name(graph: FileEntry) -> str:
    depends_on = (graph.sha256, version("ai-edge-litert"), platform.machine(), _processor())
    return hashlib.sha256("\n".join(depends_on).encode()).hexdigest()


def _processor() -> str:
    """What kernels are chosen by: the processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.partition("\t")[0] in ("flags", "Features")), platform.processor())


def _tidy(folder: Path) -> None:
    """Remove what ended processes left half-written, and what was not used for long."""
    now = time.time()
    for path in folder.glob(f"*{_SUFFIX}"):
        owner = path.name.removeprefix(".").partition("-")[0] if path.name.startswith(".") else ""
        abandoned = owner.isdigit() and not Path("/proc", owner).exists()
        if abandoned or now - path.stat().st_mtime > _UNUSED_S:
            path.unlink(missing_ok=True)
