"""The output folder takes its name only when it is complete; until then everything lies in a workspace beside it.

A workspace `.{name}.partial-{random}` holds `new`, which becomes the output, and for a moment `old`, which was the
output before. Its process holds a lock on it, and the lock ends with the process, however that ends: a workspace that
nobody holds was left by a killed export, and the next one of the same output removes it, or goes on in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from mtp_export.errors import OutputError
from mtp_runtime.bundle.contract import MANIFEST_NAME

# What a bundle's manifest has and other programs' manifest.json has not.
_BUNDLE_KEYS = {"format_version", "tool_version", "export_format", "signatures"}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# What the file system says of a place that was badly chosen; anything else is no mistake of the user's.
_BAD_PLACE = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS),
        *(errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTSUP),
        *(errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY, errno.EIO),
    }
)


def check_output(output: Path, *, force: bool) -> None:
    """Check that the name is free, or may be taken from a bundle.

    Raises:
        OutputError: something is there and `force` is false, or it is no bundle.
    """
    if not os.path.lexists(output):
        return
    if not force:
        raise OutputError(f"{output} exists: choose another --output, or replace it with --force")
    if not _is_bundle(output):
        raise OutputError(f"{output} is not a bundle, so --force does not replace it: choose another --output")


def _is_bundle(folder: Path) -> bool:
    """Whether a folder was written by an export, of this version or another."""
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.keys() >= _BUNDLE_KEYS


def check_free(output: Path, needed_bytes: int) -> None:
    """Check that the disk of an output has room for it.

    Raises:
        OutputError: it has not.
    """
    folder = output.absolute().parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(
            f"{folder} has {free / 1e9:.2f} GB free and the bundle needs {needed_bytes / 1e9:.2f} GB: free some space, "
            "or choose another --output"
        )


@contextlib.contextmanager
def staged_folder(output: Path, *, force: bool, resume: bool = False) -> Iterator[Path]:
    """Yield a folder that becomes `output` if the block succeeds, and vanishes if it does not. It is empty, or with
    `resume` what a killed export of the same output left.

    Raises:
        OutputError: the output exists and `force` is false, or cannot be written, or the disk is full.
    """
    output = Path(os.path.abspath(output))
    with _explained(output), _parents(output.parent):
        leftover = _take_leftovers(output, keep_one=resume)
        check_output(output, force=force)
        with _workspace(output, leftover) as workspace:
            stage = workspace / "new"
            stage.mkdir(exist_ok=True)
            yield stage
            _replace(workspace, output, force=force)


@contextlib.contextmanager
def _explained(output: Path) -> Iterator[None]:
    """Turn what the file system says into what the user can do."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise OutputError(f"the disk of {output.parent} is full: free some space, nothing was written") from error
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"cannot write {output}: the bundle has larger files than are allowed there: choose another --output"
            ) from error
        if error.errno in _BAD_PLACE:
            reason = os.strerror(error.errno).lower()
            raise OutputError(f"cannot write {output}: {reason}: choose another --output") from error
        raise


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make the folders above the output; those that were not there before go again if the block fails."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    nearest = missing[-1].parent if missing else folder
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # it was never made, or holds another's files by now
                parent.rmdir()
        raise


@contextlib.contextmanager
def _workspace(output: Path, leftover: tuple[Path, int] | None) -> Iterator[Path]:
    """Yield a workspace that this process holds: `leftover`, which it holds already, or a new one."""
    lock: int | None
    if leftover is None:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        lock = _lock(folder)
    else:
        folder, lock = leftover
    try:
        yield folder
    finally:
        with uninterrupted():
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Take a folder for this process; None if another has it, or if there are no locks on this file system."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _take_leftovers(output: Path, *, keep_one: bool) -> tuple[Path, int] | None:
    """Remove what killed exports of the same output left, and put an old output back that one had moved aside.

    Returns:
        With `keep_one` the workspace with most in it, which then is not removed, and the lock on it.
    """
    name = re.compile(re.escape(f".{output.name}.partial-") + r"[a-z0-9_]{8}")
    locked: list[tuple[Path, int]] = []
    for leftover in output.parent.iterdir():
        if not name.fullmatch(leftover.name):
            continue
        lock = _lock(leftover)
        if lock is None:
            continue
        if (leftover / "old").exists() and not os.path.lexists(output):
            (leftover / "old").rename(output)
        locked.append((leftover, lock))
    locked.sort(key=lambda item: _bytes_in(item[0]))
    kept = locked.pop() if keep_one and locked else None
    for leftover, lock in locked:
        shutil.rmtree(leftover, ignore_errors=True)
        os.close(lock)
    return kept


def _bytes_in(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def _replace(workspace: Path, output: Path, *, force: bool) -> None:
    """Put the finished folder in place; with `force` the one before it moves aside first."""
    with uninterrupted():
        aside = force and os.path.lexists(output)
        if aside:
            output.rename(workspace / "old")
        try:
            (workspace / "new").rename(output)
        except OSError:
            if aside:
                (workspace / "old").rename(output)
            raise


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let signals wait until the block is done, so that a second Ctrl-C does not leave it half done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread alone
        return
    late: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda got, frame: late.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if late:
            signal.raise_signal(late[0])
