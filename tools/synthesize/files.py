"""Writing a checkpoint folder: safetensors in one file or in shards, tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.synthesize.layout import StoredTensor
from tools.synthesize.values import Values


def write_weights(
    folder: Path,
    tensors: Sequence[StoredTensor],
    values: Values,
    on_bytes: Callable[[int], None],
    shard_bytes: int | None = None,
) -> None:
    """Write `model.safetensors`; or, with `shard_bytes`, shards of at most this size (a larger tensor has its own) and
    their index, as transformers saves them."""
    shards = [tensors] if shard_bytes is None else _shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0], values, on_bytes)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, values, on_bytes)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.size_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Sequence[StoredTensor], shard_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = []
    filled = 0
    for tensor in tensors:
        if not shards or filled + tensor.size_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size_bytes
    return shards


def write_file(path: Path, tensors: Sequence[StoredTensor], values: Values, on_bytes: Callable[[int], None]) -> None:
    """Write a new file: its header, then the data without gaps."""
    ordered = _in_order(tensors)
    with path.open("xb") as file:
        file.write(header(ordered))
        for tensor in ordered:
            for block in values.blocks(tensor):
                file.write(block.data)
                on_bytes(block.nbytes)


def header(tensors: Sequence[StoredTensor]) -> bytes:
    """What a file begins with: the length of the JSON that follows in 8 bytes, then names, types, shapes and places."""
    places: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in _in_order(tensors):
        begin, end = end, end + tensor.size_bytes
        places[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(places, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _in_order(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """As the library writes them: the widest type first, so that everything is aligned; then by name."""
    return sorted(tensors, key=lambda tensor: (-tensor.item_bytes, tensor.name))
