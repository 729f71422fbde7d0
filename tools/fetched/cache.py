"""A cache of prepared folders, each built once and named by what it is built from."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mtp_runtime.user_cache import user_cache


def cache_folder() -> Path:
    """Return where prepared folders are: `MTP_CACHE`, or mtp-export in the user's cache folder."""
    setting = os.environ.get("MTP_CACHE")
    base = Path(setting) if setting else user_cache()
    base.mkdir(parents=True, exist_ok=True)
    return base


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock `name` of this cache: one process builds, others wait for it."""
    with (cache_folder() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepared(name: str, parts: Iterable[str], build: Callable[[Path], None]) -> Path:
    """Return the folder `name` made of `parts`, calling `build` with an empty folder if it is not there yet.

    It is built beside its place and renamed; other versions of the same name are removed.
    """
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}-{key}"
    with locked(name):
        if not path.exists():
            building = Path(tempfile.mkdtemp(prefix=f"{name}-building-", dir=path.parent))
            try:
                build(building)
                building.rename(path)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
    return path
