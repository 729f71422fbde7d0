"""Opening checkpoints. Only safetensors are read: nothing in a checkpoint is ever executed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mtp_export.errors import CheckpointError
from mtp_export.source import stored_integers
from mtp_export.source.names import canonical_names
from mtp_runtime.bundle.bundle import sha256_of
from mtp_runtime.bundle.contract import FileEntry

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
ADAPTER_CONFIG = "adapter_config.json"
_NAMED_FILE = "transformers_weights"  # a key of config.json
_SHARD = re.compile(r"model-(?P<number>\d{1,6})-of-(?P<total>\d{1,6})\.safetensors")
FLOATS = ("BF16", "F16", "F32", "F64")
_ORDERING = "token_ordering"
_TIES = "tie_word_embeddings"
EMBEDDINGS = {"target": "embed_tokens.weight", "drafter": "model.embed_tokens.weight"}  # by part
HEAD = "lm_head.weight"
_ROWS_AT_ONCE = 1024  # of two tables that are compared: some megabytes of each
_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_TEXT_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a stored tensor lies, its name there, and what its header says."""

    file: Path
    stored: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """An opened checkpoint folder: parsed config, tensor headers, and rows on demand.

    `tensors` go by canonical name (names.py): the text model with its head, or all of a drafter.
    """

    chat_template: Path | None = None  # a file in place of the folder's own templates

    def __init__(self, folder: Path, part: str) -> None:
        """Open `folder`; `part` ("target" or "drafter") names it in errors.

        Raises:
            CheckpointError: a file is missing, truncated or not what it should be.
        """
        if not os.path.isdir(folder):
            raise CheckpointError(f"no {part} checkpoint at {folder}: give a folder with config.json and *.safetensors")
        self.folder, self.part = folder, part
        self._refuse_adapter()
        self.config = self.read_json("config.json")
        self._files: dict[Path, Any] = {}
        self._index: list[str] = []  # the index that was read, if one was
        stored: dict[str, TensorInfo] = {}
        for path in self._shards():
            self._add_headers(path, stored)
        model_type = self.config.get("model_type") if isinstance(self.config, dict) else None
        self.names = canonical_names(stored, part, model_type, str(folder))
        self.tensors = {name: stored[original] for name, original in self.names.stored.items()}
        integers = any(info.dtype not in FLOATS for name, info in self.tensors.items() if not name.endswith(_ORDERING))
        self.formats = (
            stored_integers.read_quantization(self.config, str(folder / "config.json")) if integers else frozenset()
        )

    def _refuse_adapter(self) -> None:
        """transformers loads a folder with an adapter's config as that adapter's base with the adapter on it."""
        if self.has(ADAPTER_CONFIG):
            raise CheckpointError(
                f"{self.folder} holds an adapter ({ADAPTER_CONFIG}), and transformers loads such a folder as its base "
                "with the adapter on it: give the base with --checkpoint and this folder with --adapter, or remove the "
                "adapter_* files if the weights beside them are merged"
            )

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
            refuse_pointer(path)
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
        if text.startswith("\ufeff"):  # transformers does not read it either
            raise CheckpointError(f"{self.folder / name} begins with a byte order mark: save it as UTF-8 without one")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also for integers of thousands of digits
            raise CheckpointError(f"{self.folder / name} is not JSON ({error}): download it again") from error

    def has(self, name: str) -> bool:
        return os.path.isfile(self.folder / name)  # False for a name that the file system does not take

    def _shards(self) -> list[Path]:
        """The files that hold the weights: the one that the config names, the whole one, or those of the index, as
        transformers takes them; without an index, a full set by its own numbering."""
        named = self.config.get(_NAMED_FILE) if isinstance(self.config, dict) else None
        if named is not None:
            name = self._safe_name(named, f"config.json: {_NAMED_FILE}")
            if not name.endswith((".safetensors", ".safetensors.index.json")):
                raise CheckpointError(
                    f"{self.folder / 'config.json'}: {_NAMED_FILE} is {name!r}, expected the name of a .safetensors "
                    "file, or of its index"
                )
            return self._indexed(name) if name.endswith(".index.json") else [self._existing(name)]
        if self.has(_SINGLE):
            return [self.folder / _SINGLE]
        if self.has(_INDEX):
            return self._indexed(_INDEX)
        return self._numbered()

    def _indexed(self, index_name: str) -> list[Path]:
        index, self._index = self.read_json(index_name), [index_name]
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
            raise CheckpointError(f"{self.folder / index_name} has no valid weight_map: download it again")
        return [self._existing(self._safe_name(name, index_name)) for name in sorted(set(names.values()))]

    def _safe_name(self, name: Any, where: str) -> str:
        """A path below the folder, as transformers takes it."""
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or parts[0] == "/" or ".." in parts or "\\" in name or "\0" in name:
            raise CheckpointError(f"{self.folder / where} names the unsafe file {name!r}")
        return str(name)

    def _existing(self, name: str) -> Path:
        if not self.has(name):
            raise CheckpointError(f"{self.folder / name} is missing: the {self.part} checkpoint is incomplete")
        return self.folder / name

    def _numbered(self) -> list[Path]:
        """Shards without their index: all of `model-00001-of-00003.safetensors` and so on."""
        shards = {path.name: match for path in self.folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
        if not shards:
            if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*")):
                raise CheckpointError(
                    f"{self.folder} has only pickled weights, which can run code when loaded: save it as safetensors"
                )
            raise CheckpointError(f"{self.folder / _SINGLE} is missing: the {self.part} checkpoint is incomplete")
        totals = {int(match["total"]) for match in shards.values()}
        if len(totals) > 1:
            raise CheckpointError(
                f"{self.folder} holds shards of several checkpoints, and no {_INDEX}: download it again"
            )
        total, there = totals.pop(), {int(match["number"]) for match in shards.values()}
        missing = next((number for number in range(1, total + 1) if number not in there), None)
        if missing is not None:
            raise CheckpointError(
                f"{self.folder}: shard {missing} of {total} is missing: the {self.part} checkpoint is incomplete"
            )
        return [self.folder / name for name in sorted(shards)]

    def _add_headers(self, path: Path, stored: dict[str, TensorInfo]) -> None:
        with self._reading(path) as file:
            for name in sorted(file.keys()):
                view = file.get_slice(name)
                if name in stored:
                    raise CheckpointError(
                        f"tensor {name} lies in {stored[name].file.name} and in {path}: "
                        "the checkpoint contradicts itself, download it again"
                    )
                shape = tuple(view.get_shape())
                stored[name] = TensorInfo(file=path, stored=name, shape=shape, dtype=view.get_dtype())

    @property
    def tables(self) -> tuple[str, ...]:
        """The stored ones of token embedding and head, the embedding first: both, or the one that stands for both.

        Raises:
            CheckpointError: neither is stored, or the config does not tie them and one is missing.
        """
        names = (EMBEDDINGS[self.part], HEAD)
        there = tuple(name for name in names if not self._stored_as(name).isdisjoint(self.tensors))
        if there == names or (there and self.ties):
            return there
        missing = next(name for name in names if name not in there)
        if self.ties:
            raise self.names.missing(missing, str(self.folder))
        raise CheckpointError(
            f"{self.folder}: config.json says {_TIES} = false, and tensor {missing} is missing: the checkpoint is "
            f"incomplete, or set {_TIES} to true if its head is its embedding"
        )

    @functools.cached_property
    def tied(self) -> bool:
        """Whether the head is the token embedding. As in transformers, the config ties them, unless both are stored and
        differ; only where both are stored, and the config ties them, are weights read.

        Raises:
            CheckpointError: as of `tables`, or a file is damaged.
        """
        return self.ties and (len(self.tables) == 1 or self._same(*self.tables))

    @property
    def embedding(self) -> str:
        """Name of the tensor that tokens are looked up in."""
        return self.tables[0]

    @property
    def head(self) -> str:
        """Name of the tensor that scores tokens; reads weights as `tied` does."""
        return self.tables[0] if self.tied else HEAD

    @property
    def ties(self) -> bool:
        """What the config says, in the place where transformers looks; it says so by default."""
        return not isinstance(self.config, dict) or self.config.get(_TIES) is not False

    def _stored_as(self, name: str) -> set[str]:
        return {name, f"{name}_packed"}

    def _same(self, name: str, other: str) -> bool:
        """Whether two matrices have the same values, and the same scales where they are stored as integers."""
        for suffix in ("", "_packed", "_scale"):
            pair = [self.tensors.get(n + suffix) for n in (name, other)]
            if pair == [None, None]:
                continue
            first, second = pair
            if first is None or second is None or first.shape != second.shape:
                return False
            for start in range(0, first.shape[0], _ROWS_AT_ONCE):
                rows = [self._raw(info, start, start + _ROWS_AT_ONCE) for info in (first, second)]
                if not torch.equal(rows[0].double(), rows[1].double()):  # in doubles, whatever either is stored in
                    return False
        return True

    def _raw(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        with self._reading(info.file) as file:
            rows: torch.Tensor = file.get_slice(info.stored)[start:stop]
        return rows

    def files(self) -> list[Path]:
        """Every file that an export depends on, in a fixed order."""
        names = (name for name in (*TEXT_FILES, *self._index) if self.has(name))
        if self.chat_template is None:
            present = [*(self.folder / name for name in names), *sorted(self.folder.glob(MORE_TEMPLATES))]
        else:
            present = [*(self.folder / name for name in names if name not in TEMPLATE_FILES), self.chat_template]
        return present + sorted({info.file for info in self.tensors.values()})

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a stored matrix, or a slice of a stored vector, as float32.

        Shapes: -> [stop - start, …]

        Raises:
            CheckpointError: the file is damaged, or a weight is not finite.
        """
        return self._float32(name, lambda file, stored: file.get_slice(stored)[start:stop])

    def rows_at(self, name: str, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of a stored matrix in any order, as float32. Shapes: indices [N] -> [N, …]"""
        return self._float32(name, lambda file, stored: file.get_tensor(stored)[torch.from_numpy(indices)])

    def _float32(self, name: str, read: Callable[[Any, str], torch.Tensor]) -> NDArray[np.float32]:
        info = self.tensors[name]
        with self._reading(info.file) as file:
            values: NDArray[np.float32] = read(file, info.stored).to(torch.float32).numpy()
        if not np.isfinite(values).all():
            raise CheckpointError(f"{info.file}: tensor {info.stored} holds NaN or infinity: the weights are damaged")
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
            values = file.get_slice(self.tensors[matrix.values].stored)[start:stop].numpy()
        return matrix.rows(values, self.rows(matrix.scales, start, stop))

    def integers(self, name: str) -> NDArray[np.int64]:
        """A whole stored integer vector."""
        with self._reading(self.tensors[name].file) as file:
            values: NDArray[np.int64] = file.get_tensor(self.tensors[name].stored).to(torch.int64).numpy()
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
            refuse_pointer(path)
            raise CheckpointError(f"{path} is damaged or truncated ({error}): download it again") from error


def refuse_pointer(path: Path) -> None:
    """Look whether a file that is no use is a git-LFS pointer to what it should be.

    Raises:
        CheckpointError: it is.
    """
    content = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        content = file.read(len(_POINTER))
    if content == _POINTER:
        raise CheckpointError(
            f"{path} is a git-LFS pointer, not the file itself: run `git lfs pull`, or download it again"
        )


def check_tensors(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check parameters, canonical name → shape, against the headers.

    Raises:
        CheckpointError: a tensor is missing, or of another shape or dtype.
    """
    table = EMBEDDINGS[checkpoint.part]
    shapes = dict(expected)
    if table in shapes:
        shapes |= dict.fromkeys(checkpoint.tables, shapes.pop(table))
    for name, shape in shapes.items():
        if checkpoint.quantised(name, shape) is not None:
            continue
        info = checkpoint.tensors.get(name)
        if info is None:
            raise checkpoint.names.missing(name, str(checkpoint.folder))
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {info.stored} has shape {list(info.shape)}, config.json asks for {list(shape)}"
            )
        allowed = ("I64", "I32") if name.endswith(_ORDERING) else FLOATS
        if info.dtype not in allowed:
            raise CheckpointError(
                f"{info.file}: tensor {info.stored} has dtype {info.dtype}, expected {' or '.join(allowed)}, "
                f"or integers that a {stored_integers.KEY} in config.json describes"
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


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file, under its bare name."""
    return FileEntry(path=path.name, sha256=sha256_of(path), size_bytes=os.path.getsize(path))
