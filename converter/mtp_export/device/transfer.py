"""Files to a device: none is sent twice, a transfer that was cut goes on where it was, every hash is compared.

A file takes its name on the device only after its SHA-256 was compared there, in a folder that is named by the hashes
of what it holds. So a name and a size are enough to know a file by.
"""

from __future__ import annotations

import ast
import io
import shlex
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mtp_export.device.adb import FOLDER, Adb, AdbError
from mtp_runtime.bundle.bundle import sha256_of
from mtp_runtime.bundle.contract import MANIFEST_NAME, Manifest, read_manifest
from mtp_runtime.errors import UserError

_PIECE_BYTES = 1 << 20


class Sent(NamedTuple):
    """A file on its way: where it lies here, and what it must be there."""

    path: Path
    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, path: Path) -> Sent:
        """Describe a file by what it is now."""
        return cls(path, sha256_of(path), path.stat().st_size)


class Transferred(NamedTuple):
    """The folder on the device, and how many bytes had to be sent for it."""

    folder: str
    sent_bytes: int


def send_bundle(adb: Adb, bundle: Path, on_bytes: Callable[[int, int], None] = lambda sent, total: None) -> Transferred:
    """Send the files of the bundle's folder that the device lacks; `on_bytes` gets how many bytes are sent, of all.

    Raises:
        MtpError: the bundle is none, the device has no room, or it went away.
    """
    manifest: Manifest = read_manifest(bundle)
    files = [Sent(bundle / entry.path, entry.sha256, entry.size_bytes) for entry in manifest.files.values()]
    files.append(Sent.of(bundle / MANIFEST_NAME))
    # The manifest holds the hash of every other file.
    return send(adb, files, f"{FOLDER}/bundles/{files[-1].sha256[:16]}", on_bytes)


def send_container(
    adb: Adb, bundle: Path, root: str, on_bytes: Callable[[int, int], None] = lambda sent, total: None
) -> Transferred:
    """Send what LiteRT-LM needs of a bundle, the `.litertlm` and the manifest, to a folder under `root` on the device.

    Raises:
        MtpError: the bundle has no `.litertlm`, the device has no room, or it went away.
    """
    manifest: Manifest = read_manifest(bundle)
    entry = manifest.files.get("litertlm")
    if entry is None:
        raise UserError(
            f"{bundle.name} is for {manifest.export_format}, and LiteRT-LM runs .litertlm files: export it for tflite"
        )
    files = [Sent(bundle / entry.path, entry.sha256, entry.size_bytes), Sent.of(bundle / MANIFEST_NAME)]
    return send(adb, files, f"{root}/{files[-1].sha256[:16]}", on_bytes)


def send(
    adb: Adb, files: Sequence[Sent], folder: str, on_bytes: Callable[[int, int], None] = lambda sent, total: None
) -> Transferred:
    """Send `files` to `folder` on the device, under their own names; those that are there are not sent again."""
    adb.shell(f"mkdir -p {folder}")
    # A glob that finds nothing is no failure: there is nothing yet.
    listed = adb.shell(f'cd {folder} && for f in *; do [ -f "$f" ] && stat -c \'%s %n\' "$f"; done; true')
    there = {name: int(size) for size, name in (line.split(" ", 1) for line in listed.splitlines())}
    missing = [file for file in files if there.get(file.path.name) != file.size_bytes]
    offsets = [_offset(file, there) for file in missing]
    total = sum(file.size_bytes - offset for file, offset in zip(missing, offsets, strict=True))
    _check_room(adb, folder, total)
    done = 0
    for file, offset in zip(missing, offsets, strict=True):
        _send_file(adb, file, folder, offset, lambda sent, before=done: on_bytes(before + sent, total))  # type: ignore[misc]
        done += file.size_bytes - offset
    return Transferred(folder, total)


def code_archive(folder: Path, module: str) -> Sent:
    """Write a zip of what a device needs to run `module`: mtp_runtime, and what it imports of its own package.

    The same code gives the same bytes.
    """
    import mtp_export
    import mtp_runtime

    runtime, export = (Path(str(package.__file__)).parent for package in (mtp_runtime, mtp_export))
    modules = [path.relative_to(runtime.parent) for path in sorted(runtime.rglob("*.py"))]
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for root, paths in ((runtime.parent, modules), (export.parent, imported_modules(export.parent, module))):
            for path in paths:
                archive.writestr(zipfile.ZipInfo(path.as_posix()), (root / path).read_bytes())
    path = folder / "code.zip"
    path.write_bytes(data.getvalue())
    return Sent.of(path)


def imported_modules(root: Path, module: str) -> list[Path]:
    """Return the files below `root` that importing `module` reads: its own, those that it imports at its top level of
    the same package, and so on, with the `__init__.py` of every folder between."""
    top, waiting, paths = module.partition(".")[0], [module], set[Path]()
    while waiting:
        name = Path(*waiting.pop().split("."))
        path = next((p for p in (name.with_suffix(".py"), name / "__init__.py") if (root / p).is_file()), None)
        if path is None or path in paths:
            continue  # a name of a module, and no module; or one that was read already
        paths.add(path)
        waiting += [".".join(folder.parts) for folder in name.parents if folder.parts]
        for node in ast.parse((root / path).read_bytes()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == top:
                waiting += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names if alias.name.partition(".")[0] == top]
    return sorted(paths)


def _offset(file: Sent, there: dict[str, int]) -> int:
    """Return how many bytes of a file an earlier, cut transfer has brought there."""
    part = there.get(_part_name(file), 0)
    return part if part <= file.size_bytes else 0


def _part_name(file: Sent) -> str:
    return f"{file.path.name}.{file.sha256[:16]}.part"


def _check_room(adb: Adb, folder: str, needed: int) -> None:
    fields = adb.shell(f"df -k {folder}").splitlines()[-1].split()
    free = int(fields[3]) * 1024
    if free < needed:
        raise AdbError(
            f"{adb.serial} has {free / 1e6:.0f} MB free in {folder} and {needed / 1e6:.0f} MB are to be sent: free "
            f"some space there (old bundles are in {FOLDER}/bundles) and run it again"
        )


def _send_file(adb: Adb, file: Sent, folder: str, offset: int, on_bytes: Callable[[int], None]) -> None:
    name, part = (shlex.quote(f"{folder}/{name}") for name in (file.path.name, _part_name(file)))
    write = ">>" if offset else ">"
    adb.shell(f"cat {write} {part}", stdin=_pieces(file.path, offset, on_bytes))
    arrived = adb.shell(f"sha256sum {part}").split()[0]
    if arrived != file.sha256:
        adb.shell(f"rm {part}")
        raise AdbError(
            f"{file.path.name} arrived on {adb.serial} with SHA-256 {arrived[:16]}…, the manifest has "
            f"{file.sha256[:16]}…: run it again, and try another cable if that does not help"
        )
    adb.shell(f"mv {part} {name}")


def _pieces(path: Path, offset: int, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    sent = 0
    with path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(_PIECE_BYTES):
            yield piece
            sent += len(piece)
            on_bytes(sent)
