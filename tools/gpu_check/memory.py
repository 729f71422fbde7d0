"""What runs of other processes take of memory, on the GPU and off it, looked at while they run."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from types import TracebackType

_INTERVAL_S = 0.5


class Watched:
    """Peaks in MiB while it is open: on the GPU, more than when it was opened; of child processes, without a file
    behind it and mapped from files."""

    def __init__(self) -> None:
        self.mib = {"gpu": 0, "anonymous": 0, "mapped": 0}

    def __enter__(self) -> Watched:
        self._idle, self._done = gpu_memory_mib(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            used = {"gpu": gpu_memory_mib() - self._idle} | _of_children()
            self.mib = {name: max(self.mib[name], value) for name, value in used.items()}


def gpu_memory_mib() -> int:
    """Memory in use on the first GPU, as nvidia-smi tells it; 0 where there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0])
    except (OSError, subprocess.CalledProcessError):
        return 0


def _of_children() -> dict[str, int]:
    fields = {"RssAnon": 0, "RssFile": 0}
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            try:
                lines = Path(f"/proc/{child}/status").read_text().splitlines()
            except OSError:  # it has ended meanwhile
                continue
            for line in lines:
                name, _, value = line.partition(":")
                if name in fields:
                    fields[name] += int(value.split()[0]) >> 10
    return {"anonymous": fields["RssAnon"], "mapped": fields["RssFile"]}
