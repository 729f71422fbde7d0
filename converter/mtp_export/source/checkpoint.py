"""Opening checkpoints: a local folder, a Hugging Face id, or the embedded nano. The only place that knows the
published tensor names. Only safetensors are read: nothing in a checkpoint is ever executed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mtp_export.errors import CheckpointError
from mtp_export.source import stored_integers
from mtp_runtime.bundle import sha256_of
from mtp_runtime.contract import FileEntry

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
HUB_FILES = ["*.safetensors", _INDEX, *_TEXT_FILES]  # what is fetched of a published checkpoint
_FLOATS = ("BF16", "F16", "F32")
_MAX_TEXT_BYTES = 64 << 20

# An id is an owner and a name; what begins with a dot is a path.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

# Where the text model's tensors lie: in a multimodal file, in a text-only one, and bare.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
# Parts of a multimodal file that are not exported, tensors that KV-shared layers carry without using them, scales of a
# quantised KV cache, and the tied head, which may be stored twice.
_IGNORED = re.compile(
    r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector)\."
    r"|.*\.layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.(weight(_packed|_scale|_shape)?|(in|out)put_scale)$"
    r"|.*\.layers\.\d+\.self_attn\.[kv]_(cache_)?scale$"
    r"|lm_head\.(weight(_packed|_scale|_shape)?|(in|out)put_scale)$"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a stored tensor lies, and what its header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """An opened checkpoint folder: parsed config, tensor headers, and rows on demand."""

    def __init__(self, folder: Path, part: str) -> None:
        """Open `folder`; `part` ("target" or "drafter") names it in errors.

        Raises:
            CheckpointError: a file is missing, truncated or not what it should be.
        """
        if not os.path.isdir(folder):
            raise CheckpointError(f"no {part} checkpoint at {folder}: give a folder with config.json and *.safetensors")
        self.folder, self.part = folder, part
        self.config = self.read_json("config.json")
        self.formats = stored_integers.read_quantization(self.config, str(folder / "config.json"))
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[Path, Any] = {}
        for path in self._shards():
            self._add_headers(path)

    def read_text(self, name: str) -> str:
        """Return a text file of the folder.

        Raises:
            CheckpointError: it is missing, no file, too large, or not UTF-8.
        """
        path = self.folder / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device has no end
                raise CheckpointError(f"{path} is not a file: the {self.part} checkpoint is damaged")
            if status.st_size > _MAX_TEXT_BYTES:
                raise CheckpointError(f"{path} is larger than {_MAX_TEXT_BYTES >> 20} MiB: this is not a {name}")
            return path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: the {self.part} checkpoint is incomplete") from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}: download it again") from error

    def read_json(self, name: str) -> Any:
        """Parse a JSON file of the folder.

        Raises:
            CheckpointError: as for text, or it is not JSON.
        """
        text = self.read_text(name)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also for integers of thousands of digits
            raise CheckpointError(f"{self.folder / name} is not JSON ({error}): download it again") from error

    def has(self, name: str) -> bool:
        return os.path.isfile(self.folder / name)  # False for a name that the file system does not take

    def _shards(self) -> list[Path]:
        if not self.has(_INDEX):
            if self.has(_SINGLE):
                return [self.folder / _SINGLE]
            if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*")):
                raise CheckpointError(
                    f"{self.folder} has only pickled weights, which can run code when loaded: save it as safetensors"
                )
            raise CheckpointError(f"{self.folder / _SINGLE} is missing: the {self.part} checkpoint is incomplete")
        index = self.read_json(_INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
            raise CheckpointError(f"{self.folder / _INDEX} has no valid weight_map: download it again")
        shards = sorted(set(names.values()))
        for shard in shards:
            if "/" in shard or "\\" in shard or shard in ("", ".", "..") or "\0" in shard:
                raise CheckpointError(f"{self.folder / _INDEX} names the unsafe file {shard!r}")
            if not self.has(shard):
                raise CheckpointError(f"{self.folder / shard} is missing: the {self.part} checkpoint is incomplete")
        return [self.folder / shard for shard in shards]

    def _add_headers(self, path: Path) -> None:
        with self._reading(path) as file:
            for name in sorted(file.keys()):
                view = file.get_slice(name)
                if name in self.tensors:
                    raise CheckpointError(
                        f"tensor {name} lies in {self.tensors[name].file.name} and in {path}: "
                        "the checkpoint contradicts itself, download it again"
                    )
                self.tensors[name] = TensorInfo(file=path, shape=tuple(view.get_shape()), dtype=view.get_dtype())

    def files(self) -> list[Path]:
        """Every file that an export depends on, in a fixed order."""
        present = [self.folder / name for name in (*_TEXT_FILES, _INDEX) if self.has(name)]
        return present + sorted({info.file for info in self.tensors.values()})

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a stored matrix, or a slice of a stored vector, as float32.

        Shapes: -> [stop - start, …]

        Raises:
            CheckpointError: the file is damaged, or a weight is not finite.
        """
        return self._float32(name, lambda file: file.get_slice(name)[start:stop])

    def rows_at(self, name: str, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of a stored matrix in any order, as float32. Shapes: indices [N] -> [N, …]"""
        return self._float32(name, lambda file: file.get_tensor(name)[torch.from_numpy(indices)])

    def _float32(self, name: str, read: Callable[[Any], torch.Tensor]) -> NDArray[np.float32]:
        path = self.tensors[name].file
        with self._reading(path) as file:
            values: NDArray[np.float32] = read(file).to(torch.float32).numpy()
        if not np.isfinite(values).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity: the weights are damaged")
        return values

    def quantised(self, name: str, shape: tuple[int, ...]) -> stored_integers.StoredMatrix | None:
        """The matrix `name` if it is stored as integers, None where it is not.

        Raises:
            CheckpointError: it is, in a way that contradicts the shape or the config.
        """
        return stored_integers.find(self.tensors, name, shape, self.formats, str(self.folder))

    def quantised_rows(self, matrix: stored_integers.StoredMatrix, start: int, stop: int) -> stored_integers.Rows:
        """Rows of a matrix that is stored as integers.

        Raises:
            CheckpointError: the file is damaged, a scale is not finite, or the stored shape is another.
        """
        if matrix.stated_shape is not None and tuple(stated := self.integers(matrix.stated_shape)) != matrix.shape:
            raise CheckpointError(
                f"{self.tensors[matrix.stated_shape].file}: tensor {matrix.stated_shape} is {stated.tolist()}, "
                f"config.json asks for {list(matrix.shape)}"
            )
        with self._reading(self.tensors[matrix.values].file) as file:
            values = file.get_slice(matrix.values)[start:stop].numpy()
        return matrix.rows(values, self.rows(matrix.scales, start, stop))

    def integers(self, name: str) -> NDArray[np.int64]:
        """A whole stored integer vector."""
        with self._reading(self.tensors[name].file) as file:
            values: NDArray[np.int64] = file.get_tensor(name).to(torch.int64).numpy()
        return values

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[Any]:
        """Give a safetensors file, opened once: its header takes longer to parse than a block of rows to read.

        Raises:
            CheckpointError: what is read of it is damaged.
        """
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
            yield self._files[path]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or truncated ({error}): download it again") from error


def text_prefix(checkpoint: Checkpoint) -> str:
    """What the target's parameters are prefixed with in this file.

    Raises:
        CheckpointError: there is no text model in it.
    """
    for prefix in TEXT_PREFIXES:
        if any(f"{prefix}embed_tokens.{stored}" in checkpoint.tensors for stored in ("weight", "weight_packed")):
            return prefix
    raise CheckpointError(f"{checkpoint.folder}: no tensor …embed_tokens.weight: this is not a Gemma 4 checkpoint")


def check_tensors(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], prefix: str) -> None:
    """Check parameters, name below `prefix` → shape, against the headers.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or dtype.
    """
    of_quantised: set[str] = set()
    for name, shape in expected.items():
        stored = prefix + name
        quantised = checkpoint.quantised(stored, shape)
        if quantised is not None:
            of_quantised |= quantised.tensors
            continue
        info = checkpoint.tensors.get(stored)
        if info is None:
            raise CheckpointError(f"{checkpoint.folder}: tensor {stored} is missing: the checkpoint is incomplete")
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {stored} has shape {list(info.shape)}, config.json asks for {list(shape)}"
            )
        allowed = ("I64", "I32") if name.endswith("token_ordering") else _FLOATS
        if info.dtype not in allowed:
            raise CheckpointError(
                f"{info.file}: tensor {stored} has dtype {info.dtype}, expected {' or '.join(allowed)}, "
                f"or integers that a {stored_integers.KEY} in config.json describes"
            )
    for stored, info in checkpoint.tensors.items():
        known = stored.startswith(prefix) and stored.removeprefix(prefix) in expected
        if not known and stored not in of_quantised and not _IGNORED.match(stored):
            raise CheckpointError(
                f"{info.file}: unknown tensor {stored}: merge adapters before exporting, or give them with --adapter"
            )


def read_token_ordering(checkpoint: Checkpoint, name: str, vocab_size: int) -> NDArray[np.int64]:
    """The drafter's vocabulary in cluster order. Shapes: -> [V]

    Raises:
        CheckpointError: it is not a permutation of the vocabulary.
    """
    order = checkpoint.integers(name)
    if not np.array_equal(np.sort(order), np.arange(vocab_size)):
        raise CheckpointError(
            f"{checkpoint.tensors[name].file}: {name} is not a permutation of 0…{vocab_size - 1}: "
            "the drafter is damaged"
        )
    return order


def locate(source: str) -> Path:
    """A local folder as it is; a Hugging Face id through its cache (downloaded unless HF_HUB_OFFLINE is set).

    Raises:
        CheckpointError: the id is unknown, not cached while offline, or the download fails.
    """
    folder = local_folder(source)
    if folder is not None:
        return folder
    import huggingface_hub

    with reaching_hub(source):
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=HUB_FILES))


def local_folder(source: str) -> Path | None:
    """The folder that `source` names, there or not; None if it is a Hugging Face id."""
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


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file, under its bare name."""
    return FileEntry(path=path.name, sha256=sha256_of(path), size_bytes=os.path.getsize(path))
