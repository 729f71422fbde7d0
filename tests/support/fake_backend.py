"""A backend without graphs that notices every mistake the loop could make.

Each cache row holds the token that was processed at its position. The target's next token is a hash of the tokens
that its mask shows, in order: one wrong row, position or mask bit changes it. The drafter knows that hash; `agree`
decides at which positions it says it. The activations of a target row carry the hash of what it saw, and the
drafter raises when it is fed any other than those of the position before the pending token.

With rings, the last WINDOW tokens that it sees are those of a cache of `ring_length` slots.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_runtime.bundle.contract import FileEntry, GraphSignature, Manifest, TensorSpec
from mtp_runtime.generate.backend import FloatArray, IntArray
from mtp_runtime.generate.kv_cache import Rings, StaticKVCache
from tests.support.signatures import SmallModel

VOCAB, HIDDEN, STOP, WINDOW = 50, 16, 1, 8
# Beyond any real token, to be seen at once if a stale row leaks.
GARBAGE = 40_000.0


def next_token(tokens: Sequence[int]) -> int:
    """Return what the target says after `tokens`: never `STOP` by itself, so that tests choose where to stop."""
    digest = hashlib.sha256(bytes(str(list(tokens)), "ascii")).digest()
    return 2 + int.from_bytes(digest[:4], "little") % (VOCAB - 2)


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """Return the first `count` tokens that the target says after `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def _mark(tokens: Sequence[int]) -> float:
    return float(int.from_bytes(hashlib.sha256(bytes(str(list(tokens)), "ascii")).digest()[4:6], "little"))


class _Memory:
    def __init__(self, size: int) -> None:
        self.values = np.zeros(size, np.float32)

    def write(self, values: NDArray[np.float32]) -> None:
        self.values[:] = values.reshape(-1)

    def read(self) -> NDArray[np.float32]:
        return self.values.copy()


class FakeSignature:
    """A signature computed by a Python function of what was written."""

    def __init__(self, spec: GraphSignature, compute: Callable[[FakeSignature], None]) -> None:
        self.spec = spec
        self.inputs: dict[str, NDArray[Any]] = {}
        self.outputs: dict[str, FloatArray] = {}
        self.runs = 0
        self._compute = compute

    def write(self, name: str, values: FloatArray | IntArray) -> None:
        shape = next(tensor.fixed_shape for tensor in self.spec.inputs if tensor.name == name)
        self.inputs[name] = np.array(values).reshape(shape)

    def run(self) -> None:
        self.runs += 1
        self._compute(self)

    def read(self, name: str) -> FloatArray:
        return self.outputs[name].copy()


class FakeBackend:
    """Implements StaticGraphs for the manifest of `fake_manifest`."""

    def __init__(self, manifest: Manifest, agree: Callable[[int], bool] = lambda position: True) -> None:
        caches = [tensor for tensor in manifest.signature("target", "decode").inputs if tensor.is_cache]
        memories = {cache.name: _Memory(math.prod(cache.fixed_shape)) for cache in caches}
        self.rows, self._ring = memories["kv_cache_k_0"], memories.get("kv_cache_k_1")
        rings = Rings(frozenset(memories) - {"kv_cache_k_0"}, manifest.ring_length, WINDOW)
        self._kv_cache = StaticKVCache(
            caches, memories, manifest.cache_length, rings=rings if manifest.ring_length else None
        )
        for memory in memories.values():
            memory.values[:] = GARBAGE
        self._manifest = manifest
        self._agree = agree
        compute = {"target": self._run_target, "drafter": self._run_drafter}
        self.signatures = {
            (role, spec.name): FakeSignature(spec, compute.get(role, self._run_embedder))
            for role, specs in manifest.signatures.items()
            for spec in specs
        }

    @property
    def kv_cache(self) -> StaticKVCache:
        return self._kv_cache

    def bound(self, role: str, name: str) -> FakeSignature:
        return self.signatures[role, name]

    def close(self) -> None:
        self.signatures.clear()

    def _visible(self, signature: FakeSignature, row: int) -> list[int]:
        mask = signature.inputs["mask"][0, 0, row]
        assert set(np.unique(mask)) <= {np.float32(0.0), np.float32(-1e9)}
        seen = np.flatnonzero(mask == 0.0)
        whole = self.rows.values[seen].copy()
        if self._ring is not None:
            whole[-WINDOW:] = self._ring.values[seen[-WINDOW:] % len(self._ring.values)]
        return [int(token) for token in whole]

    def _run_embedder(self, signature: FakeSignature) -> None:
        shape = signature.spec.outputs[0].fixed_shape
        signature.outputs["embeddings"] = np.full(shape, signature.inputs["token_ids"][0, 0], np.float32)

    def _run_target(self, signature: FakeSignature) -> None:
        positions = [int(position) for position in signature.inputs["input_pos"]]
        count = signature.spec.num_tokens
        start = positions[0]
        assert positions == list(range(start, start + count))
        end = len(self.rows.values)
        if self._manifest.chooses_context and signature.spec.kind == "verify":
            end = max(end, start + count)  # rows past the end are left out
        assert start + count <= end, "the pass would be clamped"
        embeddings, per_layer = (signature.inputs[name] for name in ("embeddings", "per_layer_embeddings"))
        assert (embeddings[0, :, 0] == per_layer[0, :, 0, 0]).all()
        self._write(signature, start)
        logits = np.zeros((1, count, VOCAB), np.float32)
        activations = np.zeros((1, count, HIDDEN), np.float32)
        for row in range(count):
            seen = self._visible(signature, row)
            assert len(seen) == min(positions[row] + 1, len(self.rows.values))
            logits[0, row, next_token(seen)] = 1.0
            activations[0, row, :2] = -1.0, _mark(seen)
        if signature.spec.kind != "prefill":
            signature.outputs = {"logits": logits, "activations": activations}

    def _write(self, signature: FakeSignature, start: int) -> None:
        """Write the rows of a pass; those of a verify behind the end of the ring are left out, too."""
        rows, end = signature.inputs["embeddings"][0, :, 0], len(self.rows.values)
        self.rows.values[start : start + len(rows)] = rows[: end - start]
        if self._ring is not None:
            slots = np.arange(start, start + len(rows))
            if signature.spec.kind == "verify":
                slots = slots[: len(self._ring.values) - start % len(self._ring.values)]
            self._ring.values[slots % len(self._ring.values)] = rows[: len(slots)]

    def _run_drafter(self, signature: FakeSignature) -> None:
        """Draft after the cached tokens, the pending one and the drafts so far, which the activations carry along."""
        seen = self._visible(signature, 0)
        if self._manifest.chooses_context:
            verified = self._manifest.num_draft_tokens + 1
            assert len(seen) + verified < self._manifest.cache_length, "a drafter holds back here"
            if self._ring is not None:
                assert len(seen) % len(self._ring.values) + verified <= len(self._ring.values), "and here"
        assert signature.inputs["input_pos"].tolist() == [len(seen) - 1]
        embedding, previous = np.split(signature.inputs["activations"][0, 0], 2)
        carried = [int(embedding[0])]
        if previous[0] == -1.0:
            assert previous[1] == _mark(seen), "not the target's activations at the last processed position"
        else:
            carried = [int(token) for token in previous[1 : 1 + int(previous[0])]] + carried
        tokens = seen + carried
        right = next_token(tokens)
        draft = right if self._agree(len(tokens)) else 2 + (right - 1) % (VOCAB - 2)
        assert draft != right or self._agree(len(tokens))
        projected = np.zeros((1, 1, HIDDEN), np.float32)
        projected[0, 0, : 1 + len(carried)] = [len(carried), *carried]
        logits = np.zeros((1, 1, VOCAB), np.float32)
        logits[0, 0, draft] = 1.0
        signature.outputs = {"logits": logits, "projected_activations": projected}


def fake_manifest(
    *,
    cache_length: int = 64,
    num_draft_tokens: int = 4,
    prefill: Sequence[int] = (8, 16),
    attention_lengths: Sequence[int] = (16, 32),
    longest_context_length: int = 0,
    ring_length: int = 0,
) -> Manifest:
    """Return a manifest for FakeBackend.

    It is of format version 1, with variants of decode, verify and draft for each attention length; or, with a
    `longest_context_length`, of version 2, as it is exported, and `cache_length` a prime above that.
    """
    chooses = longest_context_length > 0
    lengths = [cache_length, *([ring_length] * 2 if ring_length else [])]
    caches = tuple(
        TensorSpec(name=f"kv_cache_k_{i}", shape=(1, 1, length, 1), dtype="float32") for i, length in enumerate(lengths)
    )
    model = SmallModel(
        vocab_size=VOCAB, hidden_size=HIDDEN, per_layer=(1, 1), caches=caches, drafter_caches=len(caches)
    )
    verified, whole = num_draft_tokens + 1, 0 if chooses else cache_length
    suffixes = [("", whole), *((f"_{length}", length) for length in attention_lengths if not chooses)]
    signatures = {
        "target": (
            *(model.target(f"prefill_{size}", "prefill", size, whole) for size in prefill),
            *(model.target(f"decode{suffix}", "decode", 1, length) for suffix, length in suffixes),
            *(model.target(f"verify{suffix}", "verify", verified, length) for suffix, length in suffixes),
        ),
        "drafter": tuple(model.drafter(f"draft{suffix}", length) for suffix, length in suffixes),
        **model.embedders(),
    }
    entry = FileEntry(path="x", sha256="", size_bytes=0)
    return Manifest(
        format_version=2 if chooses else 1,
        tool_version="0",
        model="fake",
        export_format="tflite",
        recipe="f32",
        drafter_recipe="f32",
        cache_length=cache_length,
        num_draft_tokens=num_draft_tokens,
        context_length=longest_context_length or cache_length - num_draft_tokens,
        longest_context_length=longest_context_length,
        ring_length=ring_length,
        drafter_position_offset=0,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        bos_token_id=2,
        stop_token_ids=(STOP,),
        target={"sliding_window": WINDOW},
        drafter={},
        inputs=(),
        files=dict.fromkeys(signatures, entry),
        signatures=signatures,
    )
