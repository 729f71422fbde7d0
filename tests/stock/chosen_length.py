"""The target of a bundle with caches of a chosen length, in LiteRT's interpreter: its bits, pass by pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from mtp_runtime.bundle.context import cache_places
from mtp_runtime.bundle.contract import Manifest, read_manifest

_HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # as LiteRT-LM masks
Caches = dict[str, NDArray[np.float32]]


def with_length(model: bytes, prime: int, length: int) -> bytes:
    """Return a model as LiteRT-LM loads it: in the shapes of tensors, multiples of another length in place of those of
    the prime."""
    content = bytearray(model)
    root = schema.Model.GetRootAs(content)
    for subgraph in map(root.Subgraphs, range(root.SubgraphsLength())):
        for tensor in map(subgraph.Tensors, range(subgraph.TensorsLength())):
            if tensor.ShapeLength():
                shape = tensor.ShapeAsNumpy()
                multiples = shape % prime == 0
                shape[multiples] = shape[multiples] // prime * length
    return bytes(content)


class TensorContent(NamedTuple):
    """A tensor of a graph: its type, its shape, and its bytes, none of one that is computed."""

    type: int
    shape: tuple[int, ...]
    content: bytes


def tensors(model: bytes) -> dict[str, list[TensorContent]]:
    """Return the tensors of a model by signature, in their order."""
    root = schema.Model.GetRootAs(model)
    by_signature: dict[str, list[TensorContent]] = {}
    for signature in map(root.SignatureDefs, range(root.SignatureDefsLength())):
        subgraph = root.Subgraphs(signature.SubgraphIndex())
        contents = by_signature[signature.SignatureKey().decode()] = []
        for tensor in map(subgraph.Tensors, range(subgraph.TensorsLength())):
            buffer = root.Buffers(tensor.Buffer())
            content = buffer.DataAsNumpy().tobytes() if buffer.DataLength() else b""
            if buffer.Offset() > 1:
                content = model[buffer.Offset() : buffer.Offset() + buffer.Size()]
            shape = tuple(map(int, tensor.ShapeAsNumpy())) if tensor.ShapeLength() else ()
            contents.append(TensorContent(tensor.Type(), shape, content))
    return by_signature


class Target:
    """Passes over tokens drawn by a seed, each at its position."""

    def __init__(self, folder: Path, context: int) -> None:
        self.manifest: Manifest = read_manifest(folder)
        self.context, self.ring = context, self.manifest.ring_length
        model = with_length((folder / "target.tflite").read_bytes(), self.manifest.cache_length, context)
        self._interpreter = Interpreter(model_content=model, num_threads=1)
        self._runners = {name: self._interpreter.get_signature_runner(name) for name in self.signatures}
        ids = np.random.default_rng(7).integers(110, self.manifest.vocab_size, context + 128)
        self._embeddings = _rows(folder / "embedder.tflite", ids)
        self._per_layer = _rows(folder / "per_layer_embedder.tflite", ids)

    @property
    def signatures(self) -> dict[str, int]:
        """How many tokens a pass of each signature has."""
        return {signature.name: signature.num_tokens for signature in self.manifest.signatures["target"]}

    def without_positions(self, name: str, cache: NDArray[np.float32], positions: range) -> NDArray[np.float32]:
        """Return a cache without the slots of some positions."""
        axis = cache_places(self.manifest)[name].slot_axis
        return np.ascontiguousarray(np.delete(cache, [p % cache.shape[axis] for p in positions], axis))

    def empty(self) -> Caches:
        """Return caches in which nothing was written."""
        inputs = self._runners["decode"].get_input_details()
        return {name: np.zeros(of["shape"], of["dtype"]) for name, of in inputs.items() if name.startswith("kv_cache")}

    def run(self, name: str, first: int, caches: Caches, tokens: int | None = None) -> tuple[Any, Caches]:
        """Return the logits, None of a prefill, and the caches after a pass from position `first` on.

        Of a pass with fewer `tokens` than it has rows, the others are zeros at position 0, as LiteRT-LM fills them.
        """
        rows = self.signatures[name]
        count = rows if tokens is None else tokens
        mask = np.full((1, 1, rows, self.context), _HIDDEN, np.float32)
        for row in range(count):
            mask[0, 0, row, : first + row + 1] = 0
        positions = np.zeros(rows, np.int32)
        positions[:count] = np.arange(first, first + count)
        embeddings = self._embeddings[:, first : first + rows].copy()
        per_layer = self._per_layer[:, first : first + rows].copy()
        embeddings[:, count:], per_layer[:, count:] = 0, 0
        out = self._runners[name](
            embeddings=embeddings, per_layer_embeddings=per_layer, input_pos=positions, mask=mask, **caches
        )
        return out.get("logits"), {cache: out[cache] for cache in caches}


def _rows(path: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    embed = Interpreter(model_path=str(path), num_threads=1).get_signature_runner()
    rows = [next(iter(embed(token_ids=np.array([[i]], np.int32)).values())) for i in ids]
    return np.concatenate(rows, 1)
