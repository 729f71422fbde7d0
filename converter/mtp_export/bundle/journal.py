"""Which files of a killed export are whole: a journal beside the staged folder, written as each file is finished."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import msgspec

from mtp_export.source.checkpoint import hash_file
from mtp_runtime.atomic import replacing
from mtp_runtime.bundle.contract import FileEntry

_NAME = "journal.json"


class _Content(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    made_of: str
    files: dict[str, FileEntry]


class Journal:
    """The finished files of a staged folder, with their hashes."""

    def __init__(self, stage: Path, made_of: str) -> None:
        """Read what a killed export noted beside `stage`; nothing of it counts if it was made of something else."""
        self._stage, self._path = stage, stage.parent / _NAME
        try:
            content = msgspec.json.decode(self._path.read_bytes(), type=_Content)
        except (OSError, msgspec.DecodeError):
            content = _Content(made_of=made_of, files={})
        noted = content.files if content.made_of == made_of else {}
        self.files = {name: entry for name, entry in noted.items() if self._is_whole(name, entry)}
        self._made_of = made_of
        for path in stage.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self.files:
                path.unlink()

    def _is_whole(self, name: str, entry: FileEntry) -> bool:
        path = self._stage / name
        return path.is_file() and path.stat().st_size == entry.size_bytes and hash_file(path) == entry

    def add(self, *paths: Path) -> None:
        """Note that files are finished, all of them or none."""
        self.files |= {path.name: hash_file(path) for path in paths}
        with replacing(self._path) as beside, beside.open("wb") as file:
            file.write(msgspec.json.encode(_Content(made_of=self._made_of, files=self.files)))
            file.flush()
            os.fsync(file.fileno())


def identity(*parts: object) -> str:
    """A digest of what an export is made of; `parts` are plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
