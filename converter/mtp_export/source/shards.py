"""Finding the files that hold a checkpoint's weights, as transformers finds them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mtp_export.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_NAMED_FILE = "transformers_weights"  # a key of config.json
_SHARD = re.compile(r"model-(?P<number>\d{1,6})-of-(?P<total>\d{1,6})\.safetensors")


class WeightFiles(NamedTuple):
    """The files with weights, and the name of the index that lists them, if one does."""

    paths: list[Path]
    index_name: str | None = None


class ShardFinder:
    """Finds the weights of one folder; `part` names it in errors, `read_json` reads a JSON file of it by name."""

    def __init__(self, folder: Path, part: str, read_json: Callable[[str], Any]) -> None:
        self._folder, self._part, self._read_json = folder, part, read_json

    def find(self, config: Any) -> WeightFiles:
        """Return the file that the config names, the whole one, or those of the index, as transformers takes them;
        without an index, a full set by its own numbering.

        Raises:
            CheckpointError: a file is missing, or its name is unsafe.
        """
        named = config.get(_NAMED_FILE) if isinstance(config, dict) else None
        if named is not None:
            name = self._safe_name(named, f"config.json: {_NAMED_FILE}")
            if not name.endswith((".safetensors", ".safetensors.index.json")):
                raise CheckpointError(
                    f"{self._folder / 'config.json'}: {_NAMED_FILE} is {name!r}, expected the name of a .safetensors "
                    "file, or of its index"
                )
            return self._indexed(name) if name.endswith(".index.json") else WeightFiles([self._existing(name)])
        if self._has(_SINGLE):
            return WeightFiles([self._folder / _SINGLE])
        return self._indexed(_INDEX) if self._has(_INDEX) else WeightFiles(self._numbered())

    def _has(self, name: str) -> bool:
        return os.path.isfile(self._folder / name)

    def _indexed(self, index_name: str) -> WeightFiles:
        index = self._read_json(index_name)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
            raise CheckpointError(f"{self._folder / index_name} has no valid weight_map: download it again")
        paths = [self._existing(self._safe_name(name, index_name)) for name in sorted(set(names.values()))]
        return WeightFiles(paths, index_name)

    def _safe_name(self, name: Any, where: str) -> str:
        """Return a path below the folder, as transformers takes it."""
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or parts[0] == "/" or ".." in parts or "\\" in name or "\0" in name:
            raise CheckpointError(f"{self._folder / where} names the unsafe file {name!r}")
        return str(name)

    def _existing(self, name: str) -> Path:
        if not self._has(name):
            raise self._missing(f"{self._folder / name} is missing")
        return self._folder / name

    def _missing(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{fault}: the {self._part} checkpoint is incomplete")

    def _numbered(self) -> list[Path]:
        """Return shards without their index: all of `model-00001-of-00003.safetensors` and so on."""
        folder = self._folder
        shards = {path.name: match for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
        if not shards:
            if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
                raise CheckpointError(
                    f"{folder} has only pickled weights, which can run code when loaded: save it as safetensors"
                )
            raise self._missing(f"{folder / _SINGLE} is missing")
        totals = {int(match["total"]) for match in shards.values()}
        if len(totals) > 1:
            raise CheckpointError(f"{folder} holds shards of several checkpoints, and no {_INDEX}: download it again")
        total, there = totals.pop(), {int(match["number"]) for match in shards.values()}
        missing = next((number for number in range(1, total + 1) if number not in there), None)
        if missing is not None:
            raise self._missing(f"{folder}: shard {missing} of {total} is missing")
        return [folder / name for name in sorted(shards)]
