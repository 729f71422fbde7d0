"""Converted segments, kept from one export to the next.

Recipes, checkpoints and adapters differ in weights, and a segment has none: what a pair's first export converted serves
every later one, and a killed export goes on where it was. Entries lie in `$XDG_CACHE_HOME/mtp-export/segments` (by
default below ~/.cache), named by all that they depend on; deleting them is always safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from collections.abc import Callable, Generator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mtp_export.formats.workers import results_in_order
from mtp_runtime.atomic import write_atomically
from mtp_runtime.user_cache import user_cache

# What turns a segment into bytes, beside our own code.
_LIBRARIES = ("torch", "litert-torch", "litert-converter", "onnx", "onnxscript")
_PACKAGE = Path(__file__).parents[1]
_SOURCES = (
    "models/*.py",
    "graph/*.py",
    "formats/*/convert.py",
    "formats/tflite/lowerings.py",
    "formats/tflite/cache_lowerings.py",
    "formats/tflite/composites.py",
)
_DIGEST_BYTES = hashlib.sha256().digest_size


def cached_results(function: Callable[[Any], bytes], jobs: Sequence[Any], workers: int) -> Generator[bytes, None, None]:
    """Yield `function(job)` of each job, in the jobs' order; `workers` processes compute those that are not kept.

    Close the iterator to end the processes.

    Raises:
        BackendError: a worker died, most likely killed for its memory.
    """
    made_of = _fingerprint()
    paths = [_path(made_of + pickle.dumps((function, job))) for job in jobs]
    kept = [_read(path) for path in paths]
    missing = [job for job, content in zip(jobs, kept, strict=True) if content is None]
    with contextlib.closing(results_in_order(function, missing, workers)) as computed:
        for path, content in zip(paths, kept, strict=True):
            if content is None:
                content = next(computed)
                _keep(path, content)
            yield content


def _fingerprint() -> bytes:
    """Digest of the code and the libraries that turn a segment into bytes."""
    digest = hashlib.sha256()
    for source in sorted(path for pattern in _SOURCES for path in _PACKAGE.glob(pattern)):
        digest.update(source.read_bytes())
    for library in _LIBRARIES:
        digest.update(f"{library} {version(library)}\n".encode())
    return digest.digest()


def _path(depends_on: bytes) -> Path:
    return user_cache() / "segments" / hashlib.sha256(depends_on).hexdigest()


def _read(path: Path) -> bytes | None:
    """What is kept there; None if nothing is, or something damaged."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    content = stored[_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == stored[:_DIGEST_BYTES] else None


def _keep(path: Path, content: bytes) -> None:
    """Write beside, then rename. An export does not fail because its cache cannot be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(content).digest() + content)
