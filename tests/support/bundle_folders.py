"""Folders as exports leave them, without a graph inside."""

from __future__ import annotations

from pathlib import Path

from mtp_export.bundle.staging import staged_folder

MANIFEST = '{"format_version": 9, "tool_version": "9.0", "export_format": "tflite", "signatures": {}}'


def write_bundle(output: Path, content: str, *, force: bool = False) -> None:
    with staged_folder(output, force=force) as folder:
        (folder / "manifest.json").write_text(MANIFEST)
        (folder / "target.tflite").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leftover(parent: Path, name: str = "out") -> Path:
    folder = parent / f".{name}.partial-abcd1234"
    (folder / "new").mkdir(parents=True)
    (folder / "new" / "target.tflite").write_text("half")
    return folder
