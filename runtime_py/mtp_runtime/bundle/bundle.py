"""Opening a bundle, the folder or the `.litertlm` file, and checking it against its manifest."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from types import TracebackType

from mtp_runtime.bundle.consistency import check_consistency
from mtp_runtime.bundle.context import opened_at
from mtp_runtime.bundle.contract import FileEntry, Manifest, read_manifest
from mtp_runtime.errors import BundleError

_CHUNK_BYTES = 1 << 20


class Bundle:
    """An opened bundle: its manifest, for the context that was chosen and as `exported`, and where its files lie.

    Close it to remove unpacked files.
    """

    def __init__(
        self,
        exported: Manifest,
        folder: Path,
        unpacked: tempfile.TemporaryDirectory[str] | None,
        context_length: int | None = None,
    ) -> None:
        """Take an already checked folder; `unpacked` owns it if it is temporary.

        Raises:
            UserError: the bundle cannot have such a context.
        """
        self.exported = exported
        self.manifest = opened_at(exported, context_length)
        self._folder = folder
        self._unpacked = unpacked

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True, context_length: int | None = None) -> Bundle:
        """Open the bundle's folder or its `.litertlm` file, for a context of `context_length` tokens.

        Every file that the manifest names must be there with the stated size, and with `verify` the stated SHA-256.
        Of a `.litertlm` the graphs, the tokenizer and the chat template are unpacked into a temporary folder.

        Raises:
            BundleError: it is missing, damaged, of another kind or of a newer version.
            UserError: the bundle cannot have such a context.
        """
        path = Path(path)
        if not path.exists():
            raise BundleError(f"no bundle at {path}: give a folder or .litertlm file that mtp-export wrote")
        if path.is_dir():
            manifest = read_manifest(path)
            check_consistency(manifest)
            opened = cls(manifest, path, None, context_length)
            for role, entry in manifest.files.items():
                _check_file(role, path / entry.path, entry, verify=verify)
            return opened
        # Imported here: a folder needs neither flatbuffers nor protobuf.
        from mtp_runtime.bundle import litertlm

        unpacked = tempfile.TemporaryDirectory(prefix="mtp-runtime-")
        try:
            manifest = litertlm.unpack(path, Path(unpacked.name), verify=verify)
            return cls(manifest, Path(unpacked.name), unpacked, context_length)
        except BaseException:
            unpacked.cleanup()
            raise

    def has(self, role: str) -> bool:
        """Whether the file of `role` is at hand (a `.litertlm` does not carry all of a folder's)."""
        entry = self.manifest.files.get(role)
        return entry is not None and (self._folder / entry.path).is_file()

    def path(self, role: str) -> Path:
        """Return where the file of `role` lies.

        Raises:
            BundleError: the bundle has no such file.
        """
        if not self.has(role):
            raise BundleError(f"the bundle has no file for {role}: export it again")
        return self._folder / self.manifest.files[role].path

    def close(self) -> None:
        """Remove unpacked files; closing twice is harmless."""
        if self._unpacked is not None:
            self._unpacked.cleanup()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _check_file(role: str, path: Path, entry: FileEntry, *, verify: bool) -> None:
    try:
        size_bytes = path.stat().st_size
        if not path.is_file():
            raise BundleError(f"{path} ({role}) is not a file: export the bundle again")
        if size_bytes != entry.size_bytes:
            raise BundleError(
                f"{path} ({role}) has {size_bytes} bytes, the manifest says {entry.size_bytes}: export the bundle again"
            )
        if verify and (sha256 := sha256_of(path)) != entry.sha256:
            raise BundleError(
                f"{path} ({role}) has SHA-256 {sha256[:16]}…, the manifest says {entry.sha256[:16]}…: "
                "the file was changed, export the bundle again"
            )
    except FileNotFoundError:
        raise BundleError(f"{path} ({role}) is missing: export the bundle again") from None
    except OSError as error:
        raise BundleError(f"cannot read {path} ({role}): {error.strerror}") from error


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
