"""Segments for a runtime that writes rows and attends in one operation: any number of sequences and tokens.

The counterparts of attention.py's, without masks and slots: a cache holds the rows of a sequence one after another,
and what a token sees follows from how many there are. Sliding layers have a pool of their own, in which only the last
rows are kept (mtp_runtime/pooled_cache.py), so their slots are not positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from mtp_export.arch.spec import DecoderSpec, DrafterSpec, LayerSpec, TargetSpec
from mtp_export.models import ops
from mtp_export.models.attention import KeyValueProjection, OutputProjection, QueryProjection
from mtp_export.models.clustered_head import BatchedClusteredHead
from mtp_export.models.layers import RMSNorm
from mtp_export.models.positions import RotaryTables
from mtp_export.models.target import PerLayerInputs


class Prologue(PerLayerInputs):
    """Rotary tables and the per-layer inputs of every layer of the target."""

    def __init__(self, spec: TargetSpec) -> None:
        super().__init__(spec, spec.num_layers)
        self.rope = RotaryTables(spec, 0)

    def forward(self, embeddings: Tensor, per_layer_embeddings: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Shapes: embeddings [B,T,H], per_layer_embeddings [B,T,L,P], positions [B,T] int32
        -> rotary tables, `per_layer_input_{i}` [B,T,P]"""
        return self.rope(positions) | self.mix(embeddings, per_layer_embeddings)


class DrafterPrologue(nn.Module):
    """Projection of the input, and rotary tables; see drafter.py for `position_offset`."""

    def __init__(self, spec: DrafterSpec, position_offset: int) -> None:
        super().__init__()
        self.rope = RotaryTables(spec, position_offset)
        self.pre_projection = nn.Linear(2 * spec.backbone_hidden_size, spec.hidden_size, bias=False)

    def forward(self, activations: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Shapes: activations [B,1,2*backbone], positions [B,1] int32 -> x [B,1,H], rotary tables"""
        return self.rope(positions) | {"x": self.pre_projection(activations)}


_Query = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
_Rows = Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]


class _Projections(nn.Module):
    """The projections of a layer under one name, as the checkpoint has them."""

    o_proj: nn.Linear

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, *, owner: bool) -> None:
        super().__init__()
        query, key_value = QueryProjection(spec, layer), KeyValueProjection(spec, layer)
        parts = (query, OutputProjection(spec, layer), *((key_value,) if owner else ()))
        for part in parts:
            for name, child in part.named_children():
                self.add_module(name, child)
        self._query: _Query = query.query
        self._rows: _Rows = key_value.rows

    def query(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Shapes: x [B,T,H], rope two of [B,T,1,D] -> [B,T,heads,D]"""
        return self._query(x, rope)

    def rows(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Shapes: x [B,T,H], rope two of [B,T,1,D] -> two of [B,T,G,D]"""
        return self._rows(x, rope)


class _Attention(nn.Module):
    """The norm, the projections and the window of a layer's attention."""

    _owner: ClassVar[bool]

    def __init__(self, spec: DecoderSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.window = spec.visible(layer) or 0
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = _Projections(spec, layer, owner=self._owner)


class OwnerAttention(_Attention):
    """The attention of a layer that writes a cache."""

    _owner = True

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, **cache: Tensor) -> dict[str, Tensor]:
        """Shapes: x [B,T,H], cos and sin [B,T,1,D], cache as the fields of ops.Cache
        -> attended [B,T,H], updated caches [B,G,S,D]"""
        x = self.input_layernorm(x)
        query = self.self_attn.query(x, (cos, sin)).flatten(2)
        keys, values = self.self_attn.rows(x, (cos, sin))
        rows = (keys.flatten(2), values.flatten(2))
        out, key_cache, value_cache = ops.Cache(**cache).write_and_attend(query, rows, self.num_heads, self.window)
        return {"attended": self.self_attn.o_proj(out), "key_cache": key_cache, "value_cache": value_cache}


class ReaderAttention(_Attention):
    """The attention of a layer that reads what another layer wrote."""

    _owner = False

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, **cache: Tensor) -> dict[str, Tensor]:
        """Shapes: x [B,T,H], cos and sin [B,T,1,D], cache as the fields of ops.Cache
        -> attended [B,T,H], caches [B,G,S,D] as they were"""
        query = self.self_attn.query(self.input_layernorm(x), (cos, sin)).flatten(2)
        out, key_cache, value_cache = ops.Cache(**cache).attend(query, self.num_heads, self.window)
        return {"attended": self.self_attn.o_proj(out), "key_cache": key_cache, "value_cache": value_cache}


class TakeRows(nn.Module):
    """What is kept of a pass behind the last layer that writes a cache: the tokens whose logits are wanted."""

    def forward(self, rows: Tensor, **values: Tensor) -> dict[str, Tensor]:
        """Shapes: rows [N] int32, values [B,T,...] -> the same [B,N,...]"""
        return {name: ops.gather(value, rows, 1) for name, value in values.items()}


class CandidateHead(nn.Module):
    """Final norm, clustered head and the projection back; the row as long as the vocabulary is never made."""

    def __init__(self, spec: DrafterSpec, *, quantised: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.masked_embedding = BatchedClusteredHead(spec.head, spec.hidden_size, quantised=quantised)
        self.post_projection = nn.Linear(spec.hidden_size, spec.backbone_hidden_size, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Shapes: x [B,1,H] -> candidates [B,N] int32, scores [B,N], best [B,1] int32, projected_activations
        [B,1,backbone]"""
        hidden = self.norm(x)
        candidates, scores, best = self.masked_embedding(hidden)
        return {
            "candidates": candidates,
            "scores": scores,
            "best": best,
            "projected_activations": self.post_projection(hidden),
        }
