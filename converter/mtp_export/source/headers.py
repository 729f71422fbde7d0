"""Published checkpoints as far as a plan needs them: their small text files and the headers of their weights.

What is in the Hugging Face cache is linked. Of every other safetensors file the header is fetched, by a request for a
range, and written before a hole as large as the data; so the folder opens as any checkpoint does.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from mtp_export.errors import CheckpointError
from mtp_export.source.hub import HUB_FILES, HUB_IGNORED, local_folder, reaching_hub

_LARGE_TEXT = "tokenizer.json"  # tens of megabytes, of which a plan needs the size


class Headers:
    """Finds folders of checkpoints as `locate` does, without downloading them."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.download_bytes = 0  # what an export would download

    def find(self, source: str) -> Path:
        """Return a local folder as it is; a Hugging Face id from its cache, or as a folder of headers in `scratch`.

        Raises:
            CheckpointError: the id is unknown, or neither cached nor to be reached.
        """
        folder = local_folder(source)
        if folder is not None:
            return folder
        import huggingface_hub
        from huggingface_hub.errors import DryRunError, HfHubHTTPError

        filters: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": HUB_IGNORED}
        with reaching_hub(source):
            try:
                files = huggingface_hub.snapshot_download(source, **filters, dry_run=True)
            except DryRunError as error:
                if isinstance(error.__cause__, HfHubHTTPError):  # it was reached, and refused
                    raise error.__cause__ from error
                cached = huggingface_hub.snapshot_download(source, **filters, local_files_only=True)
                return Path(cached)
            folder = Path(tempfile.mkdtemp(dir=self.scratch))
            for file in files:
                self._add(source, file, folder / file.filename)
        return folder

    def _add(self, source: str, file: Any, path: Path) -> None:
        """Add a file of a repository, `huggingface_hub.DryRunFileInfo`, to a folder."""
        import huggingface_hub

        if not path.resolve().is_relative_to(self.scratch.resolve()):
            raise CheckpointError(f"{source} has the unsafe file {file.filename!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not file.will_download:
            path.symlink_to(Path(file.local_path).resolve())
            return
        self.download_bytes += file.file_size or 0
        if path.name == _LARGE_TEXT:
            _write_hole(path, b"", file.file_size or 0)
        elif path.suffix == ".safetensors":
            _write_hole(path, *_header(source, file.filename, file.commit_hash))
        else:
            path.symlink_to(huggingface_hub.hf_hub_download(source, file.filename, revision=file.commit_hash))


def _header(source: str, name: str, revision: str) -> tuple[bytes, int]:
    """Fetch the header of a safetensors file; returns it, and the bytes of the data that follow.

    Raises:
        CheckpointError: it is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        metadata = HfApi().parse_safetensors_file_metadata(source, name, revision=revision)
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{source}: {name} is no safetensors file: give another checkpoint") from error
    tensors = {
        name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for name, info in metadata.tensors.items()
    }
    header = json.dumps(tensors).encode()
    data_bytes = max((info.data_offsets[1] for info in metadata.tensors.values()), default=0)
    return len(header).to_bytes(8, "little") + header, data_bytes


def _write_hole(path: Path, start: bytes, hole_bytes: int) -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + hole_bytes)
