"""A session on disk: the filled rows of its cache, those that it keeps, and the tokens that they belong to.

The file: 8 bytes of magic, the SHA-256 of all that follows, the length of the header (8 bytes, little endian), the
header (JSON) and the rows of each tensor in the header's order, float32, little endian. Nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import math
import stat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
import numpy as np

from mtp_runtime.atomic import replacing
from mtp_runtime.bundle.contract import GRAPH_ROLES, Manifest
from mtp_runtime.errors import BundleError, UserError
from mtp_runtime.generate.backend import FloatArray

_MAGIC = b"MTPSAVE1"
_MAX_HEADER_BYTES = 64 << 20


class SavedSession(NamedTuple):
    """The tokens of a session, the rows of the leading ones, and a note of the caller's.

    Shapes: rows [1, G, n, D] each, of at most as many positions as there are tokens; of a ring only the last ones.
    """

    token_ids: tuple[int, ...]
    rows: dict[str, FloatArray]
    note: Any


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str
    files: dict[str, str]
    token_ids: tuple[int, ...]
    shapes: dict[str, tuple[int, int, int, int]]
    note: Any


def write_session(path: Path, manifest: Manifest, saved: SavedSession) -> None:
    """Write `saved`, a session of the bundle of `manifest`: beside `path`, then in its place.

    Raises:
        UserError: the file cannot be written, or the note is not JSON.
    """
    header = _Header(
        model=manifest.model,
        files=_identity(manifest),
        token_ids=saved.token_ids,
        shapes={name: values.shape for name, values in saved.rows.items()},
        note=saved.note,
    )
    try:
        packed = msgspec.json.encode(header)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"cannot save the session, its messages are not JSON: {error}") from error
    parts = [len(packed).to_bytes(8, "little"), packed]
    parts += [np.ascontiguousarray(values, "<f4").tobytes() for values in saved.rows.values()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    try:
        with replacing(path) as beside:
            beside.touch(0o600)  # a conversation is for its user's eyes
            with beside.open("wb") as file:
                file.writelines([_MAGIC, digest.digest(), *parts])
    except OSError as error:
        raise UserError(f"cannot write the session to {path}: {error.strerror}") from error


def read_session(path: Path, manifest: Manifest) -> SavedSession:
    """Read a session of the same bundle; the sizes are checked before anything large is read.

    Raises:
        UserError: the file cannot be read, or is no saved session, or damaged.
        BundleError: it was saved with another bundle.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device has no end
            raise UserError(f"{path} is not a file: give one that save() wrote")
        with path.open("rb") as file:
            return _read(file, path, status.st_size, manifest)
    except OSError as error:
        raise UserError(f"cannot read the session {path}: {error.strerror}") from error


def _read(file: BinaryIO, path: Path, size_bytes: int, manifest: Manifest) -> SavedSession:
    damaged = UserError(f"{path} is cut short or damaged: save the session again")
    if file.read(len(_MAGIC)) != _MAGIC:
        raise UserError(f"{path} is not a saved session: give a file that save() wrote")
    expected = file.read(32)
    length = file.read(8)
    header_bytes = int.from_bytes(length, "little")
    if len(length) < 8 or header_bytes > min(_MAX_HEADER_BYTES, size_bytes):
        raise damaged
    packed = file.read(header_bytes)
    try:
        header = msgspec.json.decode(packed, type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise damaged from error
    if header.files != _identity(manifest):
        raise BundleError(
            f"{path} was saved with another bundle (of {header.model}; this one is of {manifest.model}): "
            "open the bundle that it was saved with"
        )
    if len(header.token_ids) > manifest.context_length:
        raise UserError(
            f"{path} has {len(header.token_ids)} tokens, this session takes {manifest.context_length}: open the bundle "
            "with the context_length that it was saved with"
        )
    sizes = {name: 4 * math.prod(shape) for name, shape in header.shapes.items()}
    if (
        any(number < 0 for shape in header.shapes.values() for number in shape)
        or file.tell() + sum(sizes.values()) != size_bytes
    ):
        raise damaged
    digest = hashlib.sha256(length + packed)
    rows = {}
    for name, shape in header.shapes.items():
        values = file.read(sizes[name])
        digest.update(values)
        if len(values) != sizes[name]:
            raise damaged
        rows[name] = _array(values, shape, damaged)
    if digest.digest() != expected or not _makes_sense(header, manifest):
        raise damaged
    return SavedSession(header.token_ids, rows, header.note)


def _array(values: bytes, shape: tuple[int, ...], damaged: UserError) -> FloatArray:
    try:
        return np.frombuffer(values, "<f4").reshape(shape).astype(np.float32)
    except ValueError as error:  # no values, in a shape beyond numpy's limits
        raise damaged from error


def _makes_sense(header: _Header, manifest: Manifest) -> bool:
    """Whether the tokens are the bundle's, and as many as there are rows."""
    ids = header.token_ids
    return all(0 <= token < manifest.vocab_size for token in ids) and all(
        shape[2] <= len(ids) for shape in header.shapes.values()
    )


def _identity(manifest: Manifest) -> dict[str, str]:
    """Return the SHA-256 of every graph: rows are of use only to the graphs that wrote them."""
    return {role: entry.sha256 for role, entry in manifest.files.items() if role in GRAPH_ROLES}
