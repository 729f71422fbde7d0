"""Attention over caches: what is written and read of them, and the product itself.

Every module with a `forward` is a segment, shared by target and drafter where both have such a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_export.arch.spec import FULL, DecoderSpec, LayerSpec
from mtp_export.models import cache_ops, ops
from mtp_export.models.layers import Composable, RMSNorm, rotate
from mtp_export.models.positions import written


class QueryProjection(Composable):
    """The projections of a layer that reads keys and values which another layer wrote."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.num_heads, self.head_dim = spec.num_heads, layer.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, spec.rms_norm_eps)

    def query(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Shapes: x [1,T,H], rope two of [1,T,1,D] -> [1,T,heads,D]"""
        query = self.q_norm(self.q_proj(x).reshape(*x.shape[:2], self.num_heads, self.head_dim))
        return rotate(query, rope, by_lookup=self.composites)


class KeyValueProjection(Composable):
    """The projections whose results a layer writes to its own cache."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = layer.num_kv_heads, layer.head_dim
        self.k_proj = nn.Linear(spec.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.k_norm = RMSNorm(self.head_dim, spec.rms_norm_eps)
        self.v_norm = RMSNorm(self.head_dim, spec.rms_norm_eps, scale=False)

    def rows(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return key and value rows of the tokens of this pass. Shapes: x [B,T,H] -> two of [B,T,G,D]"""
        shape = (*x.shape[:2], self.num_kv_heads, self.head_dim)
        keys = rotate(self.k_norm(self.k_proj(x).reshape(shape)), rope, by_lookup=self.composites)
        values = self.v_norm(self.v_proj(x).reshape(shape))
        return keys, values


class ReaderQuery(nn.Module):
    """First segment of a layer without a cache: its query."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = QueryProjection(spec, layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Tensor]:
        """Shapes: x [1,T,H], cos and sin [1,T,1,D] -> query [1,T,heads,D]"""
        return {"query": self.self_attn.query(self.input_layernorm(x), (cos, sin))}


class OwnerRows(nn.Module):
    """First segment of a layer that owns a cache, as far as prefill needs it of the last one: the new rows.

    Full layers keep values as columns: both products then sum over the last axis of the cache.
    """

    def __init__(self, spec: DecoderSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = KeyValueProjection(spec, layer)
        self.values_as_columns = layer.kind == FULL

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, **where: Tensor
    ) -> dict[str, Tensor]:
        """Shapes: x [1,T,H], cos and sin [1,T,1,D], key_cache [1,G,S,D], value_cache likewise or [1,G,D,S], where as
        `positions.written` takes it -> updated caches"""
        keys, values = self.self_attn.rows(self.input_layernorm(x), (cos, sin))
        axis = 3 if self.values_as_columns else 2
        values = values.permute(0, 2, 3, 1) if self.values_as_columns else values.transpose(1, 2)
        return {
            "key_cache": written(key_cache, keys.transpose(1, 2), where, 2),
            "value_cache": written(value_cache, values, where, axis),
        }


class ReadWindow(nn.Module):
    """What sliding layers read of a cache: their window, gathered, so that its length is not that of the cache."""

    def forward(self, window: Tensor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Shapes: window [N] int32, keys and values [1,G,S,D] -> the same [1,G,N,D]"""
        return {"keys": ops.gather(keys, window, 2), "values": ops.gather(values, window, 2)}


class ReadFilled(nn.Module):
    """What full layers read of a cache: the filled slots, once for all layers that read it."""

    def forward(self, filled: Tensor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Shapes: filled [1] int32, keys [1,G,S,D], values [1,G,D,S] -> the same with n slots"""
        return {"keys": cache_ops.leading(keys, filled, 2), "values": cache_ops.leading(values, filled, 3)}


class OutputProjection(nn.Module):
    def __init__(self, spec: DecoderSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.o_proj = nn.Linear(spec.num_heads * layer.head_dim, spec.hidden_size, bias=False)


class Attend(nn.Module):
    """Second segment of a layer: softmax(query @ keys^T + mask) @ values, projected.

    The scale is 1: the norms of query and key do its work.
    """

    def __init__(self, spec: DecoderSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.self_attn = OutputProjection(spec, layer)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Shapes: query [1,T,heads,D], keys and values [1,G,N,D], mask [1,1,T,N] additive -> attended [1,T,H]"""
        folded = folded_heads(query, keys.shape[1])
        scores = ops.matmul_transposed(folded, keys).reshape(1, query.shape[2], query.shape[1], keys.shape[2])
        weights = torch.softmax(scores + mask, -1).reshape(*folded.shape[:3], keys.shape[2])
        return {"attended": self.self_attn.o_proj(unfolded_heads(ops.matmul(weights, values), query))}


class AttendFilled(Attend):
    """Attend over slots whose number is known when the graph runs."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Shapes: query [1,T,heads,D], keys [1,G,n,D], values [1,G,D,n], mask [1,1,T,n] additive -> attended [1,T,H]"""
        out = cache_ops.attend_filled(folded_heads(query, keys.shape[1]), keys, values, mask)
        return {"attended": self.self_attn.o_proj(unfolded_heads(out, query))}


def folded_heads(query: Tensor, groups: int) -> Tensor:
    """Fold the query heads of a KV head into its rows: one product per KV head, nothing is repeated.

    Shapes: query [1,T,heads,D] -> [1,G,heads/G*T,D]
    """
    _, num_tokens, num_heads, head_dim = query.shape
    return query.transpose(1, 2).reshape(1, groups, num_heads // groups * num_tokens, head_dim)


def unfolded_heads(out: Tensor, query: Tensor) -> Tensor:
    """Return the results of the heads of `query`, token by token.

    Shapes: out [1,G,heads/G*T,D], query [1,T,heads,D] -> [1,T,heads*D]
    """
    _, num_tokens, num_heads, head_dim = query.shape
    out = out.reshape(1, num_heads, num_tokens, head_dim)
    return out.transpose(1, 2).reshape(1, num_tokens, num_heads * head_dim)
