"""Opening checkpoints. Only safetensors are read: nothing in a checkpoint is ever executed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mtp_export.errors import CheckpointError
from mtp_export.source import stored_integers
from mtp_export.source.files import TextFile, refuse_pointer
from mtp_export.source.names import EMBEDDING_MODULE, HEAD_MODULE, canonical_names
from mtp_export.source.shards import ShardFinder
from mtp_runtime.bundle.bundle import sha256_of
from mtp_runtime.bundle.contract import FileEntry

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
FLOATS = ("BF16", "F16", "F32", "F64")
_ORDERING = "token_ordering"
_TIES = "tie_word_embeddings"
EMBEDDINGS = {"target": f"{EMBEDDING_MODULE}.weight", "drafter": f"model.{EMBEDDING_MODULE}.weight"}  # by part
HEAD = f"{HEAD_MODULE}.weight"
_ROWS_AT_ONCE = 1024  # of two tables that are compared: some megabytes of each
_MAX_TEXT_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a stored tensor lies: its file, its name there, shape and dtype."""

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
        weights = ShardFinder(folder, part, self.read_json).find(self.config)
        self._index_name = weights.index_name
        stored: dict[str, TensorInfo] = {}
        for path in weights.paths:
            self._add_headers(path, stored)
        model_type = self.config.get("model_type") if isinstance(self.config, dict) else None
        self.names = canonical_names(stored, part, model_type, str(folder))
        self.tensors = {name: stored[original] for name, original in self.names.stored.items()}
        integers = any(info.dtype not in FLOATS for name, info in self.tensors.items() if not name.endswith(_ORDERING))
        self.formats = (
            stored_integers.read_quantization(self.config, str(folder / "config.json")) if integers else frozenset()
        )

    def _refuse_adapter(self) -> None:
        """Refuse a folder with an adapter's config: transformers loads it as its base with the adapter on it."""
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
        return self._text_file(name).read()

    def read_json(self, name: str) -> Any:
        """Parse a JSON file of the folder.

        Raises:
            CheckpointError: as for text, or it is not JSON.
        """
        return self._text_file(name).read_json()

    def _text_file(self, name: str) -> TextFile:
        return TextFile(
            path=self.folder / name,
            max_bytes=_MAX_TEXT_BYTES,
            kind=name,
            missing=f"the {self.part} checkpoint is incomplete",
            damaged=f"the {self.part} checkpoint is damaged",
            remedy="download it again",
        )

    def has(self, name: str) -> bool:
        return os.path.isfile(self.folder / name)  # False for a name that the file system does not take

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
        """Whether the config ties head and embedding, in the place where transformers looks; it does by default."""
        return not isinstance(self.config, dict) or self.config.get(_TIES) is not False

    def _stored_as(self, name: str) -> set[str]:
        return {name, f"{name}_packed"}

    def _same(self, name: str, other: str) -> bool:
        """Return whether two matrices have the same values, and the same scales where they are stored as integers."""
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
        """Return every file that an export depends on, in a fixed order."""
        names = (name for name in (*TEXT_FILES, self._index_name) if name is not None and self.has(name))
        if self.chat_template is None:
            present = [*(self.folder / name for name in names), *sorted(self.folder.glob(MORE_TEMPLATES))]
        else:
            present = [*(self.folder / name for name in names if name not in TEMPLATE_FILES), self.chat_template]
        return present + sorted({info.file for info in self.tensors.values()})

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows of a stored matrix, or a slice of a stored vector, as float32.

        Shapes: -> [stop - start, …]

        Raises:
            CheckpointError: the file is damaged, or a weight is not finite.
        """
        return self._float32(name, lambda file, stored: file.get_slice(stored)[start:stop])

    def rows_at(self, name: str, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows of a stored matrix in any order, as float32. Shapes: indices [N] -> [N, …]"""
        return self._float32(name, lambda file, stored: file.get_tensor(stored)[torch.from_numpy(indices)])

    def _float32(self, name: str, read: Callable[[Any, str], torch.Tensor]) -> NDArray[np.float32]:
        info = self.tensors[name]
        with self._reading(info.file) as file:
            values: NDArray[np.float32] = read(file, info.stored).to(torch.float32).numpy()
        if not np.isfinite(values).all():
            raise CheckpointError(f"{info.file}: tensor {info.stored} holds NaN or infinity: the weights are damaged")
        return values

    def quantised(self, name: str, shape: tuple[int, ...]) -> stored_integers.StoredMatrix | None:
        """Return the matrix `name` if it is stored as integers, None where it is not.

        Raises:
            CheckpointError: it is, in a way that contradicts the shape or the config.
        """
        return stored_integers.find(self.tensors, name, shape, self.formats, str(self.folder))

    def quantised_rows(self, matrix: stored_integers.StoredMatrix, start: int, stop: int) -> stored_integers.Rows:
        """Return rows of a matrix that is stored as integers.

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
        """Return a whole stored integer vector."""
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
    """Return the drafter's vocabulary in cluster order. Shapes: -> [V]

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
    """Return size and SHA-256 of a file, under its bare name."""
    return FileEntry(path=path.name, sha256=sha256_of(path), size_bytes=os.path.getsize(path))
