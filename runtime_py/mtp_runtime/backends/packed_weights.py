"""Weights in the order that this processor's kernels read them, in files that every process maps.

XNNPACK packs weights when a graph is compiled: without a file for every signature anew, and in memory that nothing can
take back (E2B at int4: 8.3 GB). With one, they are packed once, at the first start, and mapped from then on.
XNNPACK looks a weight up by its place in the graph, not by its value. So a file is named by all that decides what lies
where: the graph, the library's version and the processor.

ONNX Runtime does likewise with a folder that has the graph as it was optimised and its packed weights; without one it
packs at every start (E2B at int4: 2.1 GB, 5 s).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from mtp_runtime.bundle.contract import FileEntry
from mtp_runtime.user_cache import user_cache

_UNUSED_S = 30 * 86400.0  # after which a file is removed


class Library(NamedTuple):
    """Who packs: the package, how its files' names end, and how many bytes they may take for each of a graph's."""

    package: str
    suffix: str
    room: float


LITERT = Library("ai-edge-litert", ".xnnpack_cache", 1.5)
ONNX_RUNTIME = Library("onnxruntime", ".onnx_cache", 2.5)  # what is packed, beside what it was packed from


class PackedWeights:
    """The file, or the folder, of one graph's packed weights: one that is there, or a new one that `keep` names."""

    def __init__(self, folder: Path, library: Library, *graph: FileEntry) -> None:
        """Choose the file for a graph, given its own files; there is none if the folder cannot be written or its disk
        has no room."""
        self._final = folder / f"{_name(graph, library)}{library.suffix}"
        self._new = self._final.with_name(f".{os.getpid()}-{time.monotonic_ns()}{library.suffix}")
        self.path: Path | None = None
        needed = library.room * sum(file.size_bytes for file in graph)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if self._final.exists():
                os.utime(self._final)  # it is in use
                self.path = self._final
            elif shutil.disk_usage(folder).free > needed and os.access(folder, os.W_OK):
                self.path = self._new
                _tidy(folder)

    @property
    def is_new(self) -> bool:
        """Whether it is yet to be written."""
        return self.path == self._new

    def keep(self) -> None:
        """Give a new file its name, now that it is complete; what maps it does not notice."""
        if self.is_new:
            with contextlib.suppress(OSError):  # another process was faster with a folder
                _sync(self._new)
                self._new.rename(self._final)
            if self._final.exists():
                self.path = self._final

    def discard(self) -> None:
        """Remove a new file that was not kept."""
        _remove(self._new)

    def remove(self) -> None:
        """Remove the file or folder: it cannot be used."""
        _remove(self._final)


def default_folder() -> Path:
    """The folder `packed` of the user's cache."""
    return user_cache() / "packed"


def _sync(path: Path) -> None:
    """Wait until a file, or those of a folder, are on the disk: only their lengths are checked when they are used."""
    for file in path.iterdir() if path.is_dir() else (path,):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _name(graph: Iterable[FileEntry], library: Library) -> str:
    depends_on = (*(file.sha256 for file in graph), version(library.package), platform.machine(), _processor())
    return hashlib.sha256("\n".join(depends_on).encode()).hexdigest()


def _processor() -> str:
    """Return the processor's features, by which kernels are chosen."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.partition("\t")[0] in ("flags", "Features")), platform.processor())


def _tidy(folder: Path) -> None:
    """Remove files that ended processes left half-written, and those that were not used for long."""
    now = time.time()
    for path in [path for library in (LITERT, ONNX_RUNTIME) for path in folder.glob(f"*{library.suffix}")]:
        owner = path.name.removeprefix(".").partition("-")[0] if path.name.startswith(".") else ""
        abandoned = owner.isdigit() and not Path("/proc", owner).exists()
        with contextlib.suppress(OSError):  # another process was faster
            if abandoned or now - path.stat().st_mtime > _UNUSED_S:
                _remove(path)
