"""A toy target and drafter, lowered with litert-torch to a real bundle in seconds: no weights, no training.

The target is two attention layers with fixed random weights, so that each next token depends on every earlier one.
The drafter knows the answer: it reads its drafts from a table by position, and a test says which entries are right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import litert_torch
import torch
from litert_torch.generative.custom_ops.dynamic_update_slice import dynamic_update_slice

from mtp_runtime.bundle.contract import FileEntry, GraphSignature, Manifest, TensorSpec
from tests.support.signatures import SmallModel
from tests.support.tokenizers import bpe_json

HIDDEN, LAYERS, PLE, VOCAB, HEAD, WINDOW = 32, 2, 4, 64, 16, 8
CACHE_LENGTH, NUM_DRAFT_TOKENS, SHORT = 64, 4, 32
CACHES = tuple(f"kv_cache_{kind}_{layer}" for layer in range(LAYERS) for kind in "kv")


class ToyTarget(torch.nn.Module):
    """Layer 0 sees a window, layer 1 everything below `attention_length`."""

    def __init__(self, attention_length: int, *, with_head: bool) -> None:
        super().__init__()
        self.attention_length = attention_length
        self.with_head = with_head
        random = torch.Generator().manual_seed(7)

        def matrix(rows: int, columns: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(rows, columns, generator=random) / columns**0.5)

        self.query = torch.nn.ParameterList([matrix(HEAD, HIDDEN) for _ in range(LAYERS)])
        self.key = torch.nn.ParameterList([matrix(HEAD, HIDDEN) for _ in range(LAYERS)])
        self.value = torch.nn.ParameterList([matrix(HEAD, HIDDEN) for _ in range(LAYERS)])
        self.out = torch.nn.ParameterList([matrix(HIDDEN, HEAD) for _ in range(LAYERS)])
        self.ple = torch.nn.ParameterList([matrix(HIDDEN, PLE) for _ in range(LAYERS)])
        self.head = matrix(VOCAB, HIDDEN)

    def forward(
        self,
        embeddings: torch.Tensor,
        per_layer_embeddings: torch.Tensor,
        input_pos: torch.Tensor,
        mask: torch.Tensor,
        **caches: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        zero = torch.zeros([], dtype=torch.int32)
        x = embeddings
        result: dict[str, torch.Tensor] = {}
        for layer in range(LAYERS):
            key, value = (
                dynamic_update_slice(
                    caches[f"kv_cache_{kind}_{layer}"],
                    torch.nn.functional.linear(x, weights[layer]).unsqueeze(1),
                    [zero, zero, input_pos[0], zero],
                )
                for kind, weights in (("k", self.key), ("v", self.value))
            )
            result[f"kv_cache_k_{layer}"], result[f"kv_cache_v_{layer}"] = key, value
            length = self.attention_length
            layer_mask = mask[..., :length]
            if layer == 0:
                slots = torch.arange(length, dtype=torch.int32)
                outside = (slots[None, :] <= input_pos[:, None] - WINDOW).to(torch.float32)
                layer_mask = layer_mask + outside[None, None] * -1e9
            query = torch.nn.functional.linear(x, self.query[layer]).unsqueeze(1)
            scores = torch.softmax(2.0 * query @ key[:, :, :length].transpose(-1, -2) + layer_mask, -1)
            attended = (scores @ value[:, :, :length]).squeeze(1)
            x = x + 2.0 * torch.nn.functional.linear(attended, self.out[layer])
            x = torch.tanh(x + torch.nn.functional.linear(per_layer_embeddings[:, :, layer], self.ple[layer]))
        if self.with_head:
            result["logits"] = 4.0 * torch.nn.functional.linear(x, self.head)
            result["activations"] = x
        return result


class ToyDrafter(torch.nn.Module):
    """Drafts `table[input_pos + 2 + step]`: the token at that position, in the caller's opinion.

    The step is counted in the first of the projected activations, which the target's (at most 1) cannot be mistaken
    for. The other projected activations are the mean of the visible keys and values of layer 1.
    """

    table: torch.Tensor

    def __init__(self, table: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor(table, dtype=torch.float32))

    def forward(
        self, activations: torch.Tensor, input_pos: torch.Tensor, mask: torch.Tensor, **caches: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        counter = activations[:, :, HIDDEN : HIDDEN + 1]
        step = torch.where(counter > 500.0, counter - 1000.0, torch.zeros_like(counter))
        position = input_pos.to(torch.float32).reshape(1, 1, 1) + 2.0 + step
        slots = torch.arange(self.table.shape[0], dtype=torch.float32)
        token = ((slots == position).to(torch.float32) * self.table).sum(-1, keepdim=True)
        logits = 1.0 - (torch.arange(VOCAB, dtype=torch.float32) - token).abs()
        weights = torch.softmax(mask, -1)
        seen = torch.cat([(weights @ caches[f"kv_cache_{kind}_1"])[:, 0] for kind in "kv"], -1)
        return {"logits": logits, "projected_activations": torch.cat([1001.0 + step, seen[:, :, 1:]], -1)}


class ToyLookup(torch.nn.Module):
    """A row of fixed random numbers per token."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(VOCAB, *shape, generator=torch.Generator().manual_seed(seed)))

    def forward(self, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "embeddings": torch.nn.functional.embedding(token_ids, self.table.reshape(VOCAB, -1)).reshape(
                1, 1, *self.table.shape[1:]
            )
        }


MODEL = SmallModel(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    per_layer=(LAYERS, PLE),
    caches=tuple(TensorSpec(name=name, shape=(1, 1, CACHE_LENGTH, HEAD), dtype="float32") for name in CACHES),
    drafter_caches=2,
)
TARGET_SIGNATURES = (
    MODEL.target("prefill_8", "prefill", 8, CACHE_LENGTH),
    MODEL.target("prefill_16", "prefill", 16, CACHE_LENGTH),
    MODEL.target("decode", "decode", 1, CACHE_LENGTH),
    MODEL.target(f"decode_{SHORT}", "decode", 1, SHORT),
    MODEL.target("verify", "verify", NUM_DRAFT_TOKENS + 1, CACHE_LENGTH),
    MODEL.target(f"verify_{SHORT}", "verify", NUM_DRAFT_TOKENS + 1, SHORT),
)
DRAFT_SIGNATURE = MODEL.drafter("draft", CACHE_LENGTH)
SIGNATURES = {"target": TARGET_SIGNATURES, "drafter": (DRAFT_SIGNATURE,), **MODEL.embedders()}


def _lower(path: Path, modules: Sequence[tuple[GraphSignature, torch.nn.Module]]) -> None:
    dtypes = {"float32": torch.float32, "int32": torch.int32}
    converter = litert_torch.Converter()
    for spec, module in modules:
        sample = {tensor.name: torch.zeros(tensor.fixed_shape, dtype=dtypes[tensor.dtype]) for tensor in spec.inputs}
        converter.add_signature(spec.name, module.eval(), sample_kwargs=sample)
    converter.convert(strict_export=False).export(str(path))


def lower_target(folder: Path) -> None:
    """Write the toy target and its two embedders into `folder`."""
    _lower(
        folder / "target.tflite",
        [(spec, ToyTarget(spec.attention_length, with_head=spec.kind != "prefill")) for spec in TARGET_SIGNATURES],
    )
    _lower(folder / "embedder.tflite", [(SIGNATURES["embedder"][0], ToyLookup((HIDDEN,), 1))])
    _lower(folder / "per_layer_embedder.tflite", [(SIGNATURES["per_layer_embedder"][0], ToyLookup((LAYERS, PLE), 2))])


def lower_drafter(folder: Path, table: Sequence[int]) -> None:
    """Write a drafter that drafts the token `table[p]` for position p into `folder`."""
    _lower(folder / "drafter.tflite", [(DRAFT_SIGNATURE, ToyDrafter(table))])


def tokenizer_json() -> str:
    """Return a tokenizer of 64 ids: specials, two words, and the bytes of `é` and `€` spelt by byte fallback."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "▁def", "▁add", "s", "▁"]
    fallback = [f"<0x{byte:02X}>" for byte in sorted({*"é€".encode()})]
    vocab = words + fallback + [f"▁w{index}" for index in range(VOCAB - len(words) - len(fallback))]
    return bpe_json(
        vocab,
        4,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        decoders=(
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ),
        fallback=True,
    )


def write_manifest(folder: Path, **changes: Any) -> Manifest:
    """Write the manifest of the files in `folder`, some of its fields replaced by `changes`."""
    files = {}
    names = {role: f"{role}.tflite" for role in SIGNATURES}
    for role, name in {**names, "tokenizer": "tokenizer.json", "chat_template": "chat_template.jinja"}.items():
        path = folder / name
        if path.exists():
            data = path.read_bytes()
            files[role] = FileEntry(path=path.name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    fields: dict[str, Any] = {
        "format_version": 1,
        "tool_version": "0",
        "model": "toy",
        "export_format": "tflite",
        "recipe": "f32",
        "drafter_recipe": "f32",
        "cache_length": CACHE_LENGTH,
        "num_draft_tokens": NUM_DRAFT_TOKENS,
        "context_length": CACHE_LENGTH - NUM_DRAFT_TOKENS,
        "drafter_position_offset": 0,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "bos_token_id": 2,
        "stop_token_ids": (1,),
        "target": {},
        "drafter": {},
        "inputs": (),
        "files": files,
        "signatures": SIGNATURES,
    }
    manifest = Manifest(**{**fields, **changes})
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return manifest
