"""Where a checkpoint lies: a local folder, or the cache of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mtp_export.errors import CheckpointError
from mtp_export.source.checkpoint import ADAPTER_CONFIG, MORE_TEMPLATES, TEXT_FILES

# What is fetched of a published checkpoint, and what of that is not: checkpoints of its training, in folders of theirs.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", ADAPTER_CONFIG, *TEXT_FILES, MORE_TEMPLATES]
HUB_IGNORED = ["*/*.safetensors", "*/*.json"]
# An id is an owner and a name; what begins with a dot is a path.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def locate(source: str) -> Path:
    """Return a local folder as it is; a Hugging Face id through its cache (downloaded unless HF_HUB_OFFLINE is set).

    Raises:
        CheckpointError: the id is unknown, not cached while offline, or the download fails.
    """
    folder = local_folder(source)
    if folder is not None:
        return folder
    import huggingface_hub

    with reaching_hub(source):
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))


def local_folder(source: str) -> Path | None:
    """Return the folder that `source` names, there or not; None if it is a Hugging Face id."""
    folder = Path(os.path.expanduser(source))
    return folder if os.path.lexists(folder) or not _HUB_ID.fullmatch(source) else None


@contextlib.contextmanager
def reaching_hub(source: str) -> Iterator[None]:
    """Turn what the hub's library says of an id into what the user can do.

    Raises:
        CheckpointError: the id is unknown, not cached while offline, or the download fails.
    """
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{source} is neither a folder nor in the Hugging Face cache, and the hub cannot be reached: "
            "download it first, or give a local folder"
        ) from error
    except (HFValidationError, OSError) as error:  # the hub's own HTTP errors are OSErrors
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"cannot download {source}: {first_line}: log in, or give a local folder") from error
