"""The target, cut into the segments that are traced: what comes before the layers, the second half of a layer, the
head, and the two embedders. `graph/` chains them; parameters carry the published names."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_export.arch.spec import SLIDING, DecoderSpec, LayerSpec, TargetSpec
from mtp_export.models import cache_ops
from mtp_export.models.gpu_attention import cache_starts
from mtp_export.models.layers import FeedForward, RMSNorm
from mtp_export.models.positions import RotaryTables, Window, WritePlaces, filled_slots, seen_slots


class PerLayerInputs(nn.Module):
    """The per-layer inputs of the first `num_layers` layers."""

    def __init__(self, spec: TargetSpec, num_layers: int) -> None:
        super().__init__()
        self.spec, self.num_layers = spec, num_layers
        width = spec.num_layers * spec.per_layer_size
        self.per_layer_model_projection = nn.Linear(spec.hidden_size, width, bias=False)
        self.per_layer_projection_norm = RMSNorm(spec.per_layer_size, spec.rms_norm_eps)

    def mix(self, embeddings: Tensor, per_layer_embeddings: Tensor) -> dict[str, Tensor]:
        """Mix each token's own per-layer embeddings with a projection of its embedding.

        Shapes: embeddings [B,T,H], per_layer_embeddings [B,T,L,P] -> `per_layer_input_{i}` [B,T,P]
        """
        projected = self.per_layer_model_projection(embeddings) * self.spec.hidden_size**-0.5
        projected = self.per_layer_projection_norm(projected.reshape(per_layer_embeddings.shape))
        mixed = (projected + per_layer_embeddings) * 2.0**-0.5
        return {f"per_layer_input_{i}": mixed[:, :, i] for i in range(self.num_layers)}


class TargetPrologue(PerLayerInputs):
    """Position tables and the per-layer inputs. `ring` and `ends` as `WritePlaces` has them."""

    def __init__(self, spec: TargetSpec, num_layers: int, *, ring: int | None, ends: bool) -> None:
        super().__init__(spec, num_layers)
        self.rotary, self.window = RotaryTables(spec, 0), Window(spec, aligned=True, ring=ring)
        self.places = WritePlaces(ring, ends=ends)

    def forward(
        self, embeddings: Tensor, per_layer_embeddings: Tensor, input_pos: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Shapes: embeddings [1,T,H], per_layer_embeddings [1,T,L,P], input_pos [T] int32, mask [1,1,T,S]
        -> position tables, `per_layer_input_{i}` [1,T,P]"""
        count = cache_ops.slot_count(mask)
        seen = self.window(input_pos, mask, count) | filled_slots(input_pos, mask, count)
        tables = self.rotary(input_pos[None]) | self.places(input_pos, count) | seen
        return tables | self.mix(embeddings, per_layer_embeddings)


class DelegatedPrologue(PerLayerInputs):
    """The same for a GPU, which writes caches in place and reads all of them."""

    def __init__(self, spec: TargetSpec, num_layers: int) -> None:
        super().__init__(spec, num_layers)
        self.rotary, self.window = RotaryTables(spec, 0), spec.visible(spec.kinds[SLIDING]) or 0

    def forward(
        self, embeddings: Tensor, per_layer_embeddings: Tensor, input_pos: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Shapes: as TargetPrologue, with `key_start` and `value_start` [4] int32 and masks [1,1,T,S] bool"""
        starts = cache_starts(input_pos)
        tables = self.rotary(input_pos[None]) | seen_slots(mask, input_pos, self.window)
        return starts | tables | self.mix(embeddings, per_layer_embeddings)


class TargetFeedForward(FeedForward):
    """Last segment of a layer: the feed-forward block, then the layer's own input gated into the residual."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec) -> None:
        super().__init__(spec, layer)
        assert layer.per_layer is not None, "a layer without an input of its own has a FeedForward"
        hidden = spec.hidden_size
        self.per_layer_input_gate = nn.Linear(hidden, layer.per_layer, bias=False)
        self.per_layer_projection = nn.Linear(layer.per_layer, hidden, bias=False)
        self.post_per_layer_input_norm = RMSNorm(hidden, spec.rms_norm_eps)

    def forward(self, x: Tensor, attended: Tensor, per_layer_input: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Shapes: x and attended [1,T,H], per_layer_input [1,T,P] -> x [1,T,H]"""
        x = self.residuals(x, attended)
        gated = F.gelu(self.per_layer_input_gate(x), approximate="tanh") * per_layer_input
        x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return {"x": x * self.layer_scalar}


class TargetHead(nn.Module):
    """Final norm and the soft-capped head tied to the token embedding."""

    def __init__(self, spec: TargetSpec) -> None:
        super().__init__()
        self.cap = spec.final_logit_softcapping
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Shapes: x [B,T,H] -> activations [B,T,H], logits [B,T,V]"""
        hidden = self.norm(x)
        logits = torch.tanh(F.linear(hidden, self.embed_tokens.weight) * (1.0 / self.cap)) * self.cap
        return {"activations": hidden, "logits": logits}


class Embedder(nn.Module):
    """Token embeddings scaled by sqrt(H): what LiteRT-LM feeds to target and drafter."""

    def __init__(self, spec: TargetSpec) -> None:
        super().__init__()
        self.scale = math.sqrt(spec.hidden_size)
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)

    def forward(self, token_ids: Tensor) -> dict[str, Tensor]:
        """Shapes: [B,T] int32 -> embeddings [B,T,H]"""
        return {"embeddings": self.embed_tokens(token_ids) * self.scale}


class PerLayerEmbedder(nn.Module):
    """Per-layer token embeddings scaled by sqrt(P), unpacked by layer."""

    def __init__(self, spec: TargetSpec) -> None:
        super().__init__()
        self.shape, self.scale = (spec.num_layers, spec.per_layer_size), math.sqrt(spec.per_layer_size)
        width = spec.num_layers * spec.per_layer_size
        self.embed_tokens_per_layer = nn.Embedding(spec.vocab_size_per_layer_input, width)

    def forward(self, token_ids: Tensor) -> dict[str, Tensor]:
        """Shapes: [B,T] int32 -> embeddings [B,T,L,P]"""
        rows = self.embed_tokens_per_layer(token_ids) * self.scale
        return {"embeddings": rows.reshape(*token_ids.shape, *self.shape)}


# By the role of their graph.
EMBEDDERS: dict[str, Callable[[TargetSpec], nn.Module]] = {
    "embedder": Embedder,
    "per_layer_embedder": PerLayerEmbedder,
}
