"""Signatures of small bundles, by the sizes of their models."""

from __future__ import annotations

import dataclasses

from mtp_runtime.bundle.contract import GraphSignature, SignatureKind, TensorSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallModel:
    """Sizes of a small target, whose drafter reads the last of its caches.

    per_layer: layers and size of the per-layer embeddings; caches: those of a target's pass, [1,G,S,D];
    drafter_caches: how many of them, from the last, the drafter reads.
    """

    vocab_size: int
    hidden_size: int
    per_layer: tuple[int, int]
    caches: tuple[TensorSpec, ...]
    drafter_caches: int

    @property
    def cache_length(self) -> int:
        return self.caches[0].fixed_shape[2]

    def target(self, name: str, kind: SignatureKind, tokens: int, attention_length: int) -> GraphSignature:
        """Return a pass of the target over so many tokens; a prefill has no logits."""
        heads = (
            TensorSpec(name="logits", shape=(1, tokens, self.vocab_size), dtype="float32"),
            TensorSpec(name="activations", shape=(1, tokens, self.hidden_size), dtype="float32"),
        )
        return GraphSignature(
            name=name,
            kind=kind,
            num_tokens=tokens,
            attention_length=attention_length,
            inputs=(
                TensorSpec(name="embeddings", shape=(1, tokens, self.hidden_size), dtype="float32"),
                TensorSpec(name="per_layer_embeddings", shape=(1, tokens, *self.per_layer), dtype="float32"),
                TensorSpec(name="input_pos", shape=(tokens,), dtype="int32"),
                TensorSpec(name="mask", shape=(1, 1, tokens, self.cache_length), dtype="float32"),
                *self.caches,
            ),
            outputs=(*self.caches, *(heads if kind != "prefill" else ())),
        )

    def drafter(self, name: str, attention_length: int) -> GraphSignature:
        """Return a pass of the drafter, which drafts one token."""
        return GraphSignature(
            name=name,
            kind="draft",
            num_tokens=1,
            attention_length=attention_length,
            inputs=(
                TensorSpec(name="activations", shape=(1, 1, 2 * self.hidden_size), dtype="float32"),
                TensorSpec(name="input_pos", shape=(1,), dtype="int32"),
                TensorSpec(name="mask", shape=(1, 1, 1, self.cache_length), dtype="float32"),
                *self.caches[-self.drafter_caches :],
            ),
            outputs=(
                TensorSpec(name="logits", shape=(1, 1, self.vocab_size), dtype="float32"),
                TensorSpec(name="projected_activations", shape=(1, 1, self.hidden_size), dtype="float32"),
            ),
        )

    def embedders(self) -> dict[str, tuple[GraphSignature, ...]]:
        """Return the look-ups of both tables, by role."""
        rows = {"embedder": (self.hidden_size,), "per_layer_embedder": self.per_layer}
        return {role: (_embed(row),) for role, row in rows.items()}


def _embed(row: tuple[int, ...]) -> GraphSignature:
    return GraphSignature(
        name="embed",
        kind="embed",
        num_tokens=1,
        attention_length=0,
        inputs=(TensorSpec(name="token_ids", shape=(1, 1), dtype="int32"),),
        outputs=(TensorSpec(name="embeddings", shape=(1, 1, *row), dtype="float32"),),
    )
