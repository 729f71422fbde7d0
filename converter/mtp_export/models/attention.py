"""Attention over static-size caches: what is visible, what is read, and the product itself.

Every module with a `forward` is a segment, shared by target and drafter where both have such a layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mtp_export.arch.spec import FULL, SLIDING, DecoderSpec, LayerSpec
from mtp_export.models import ops
from mtp_export.models.layers import Composable, RMSNorm, inverse_frequencies, rope_tables, rotate

# Large against any score, and within float16: there 1e9 is infinite, and 0 times that no number. Taken off the score of
# a key once per position that it lies beyond the window, or put in the place of the score.
HIDDEN = 1e4
_SEEN = -1.0  # between what masks add to a key that is seen, 0, and to one that is not


# Kernels sum a row in lanes, element i in lane i modulo at most this. Where a position always falls into the same one,
# a token's sums come out the same to the last bit in every pass: else drafts could change what is said at a tie.
_LANES = 64


def sliding_slots(input_pos: Tensor, window: int, cache_length: int) -> Tensor:
    """Return the slots that queries at consecutive positions see through a window, their own included.

    Shapes: input_pos [T] int32 -> [min(S, window - 1 + T)] int32
    """
    length = min(cache_length, window - 1 + input_pos.shape[0])
    start = torch.clamp(input_pos[:1] - (window - 1), min=0)
    return start + torch.arange(length, dtype=torch.int32)


def aligned_slots(input_pos: Tensor, window: int, cache_length: int) -> Tensor:
    """Return the slots of `sliding_slots`, and those before them down to a multiple of _LANES.

    Shapes: input_pos [T] int32 -> [min(S, window - 1 + T, rounded up so that any start fits)] int32
    """
    seen = window - 1 + input_pos.shape[0]
    length = min(cache_length, -(-(seen + _LANES - 1) // _LANES) * _LANES)
    # A table, because integers are looked up faster than divided, and a GPU would not divide them.
    starts = [[min(max(at - window + 1, 0) // _LANES * _LANES, cache_length - length)] for at in range(cache_length)]
    start: Tensor = ops.gather(torch.tensor(starts, dtype=torch.int32), input_pos[:1], 0)
    return start.reshape(1) + torch.arange(length, dtype=torch.int32)


def sliding_mask(mask: Tensor, slots: Tensor, input_pos: Tensor, window: int) -> Tensor:
    """Return the mask's columns at `slots`, with all beyond each query's window hidden.

    Shapes: mask [1,1,T,S] additive, slots [N] int32, input_pos [T] int32 -> [1,1,T,N]
    """
    visible: Tensor = ops.gather(mask, slots, 3)
    if slots.shape[0] <= window:
        return visible
    distance = input_pos.to(torch.float32).reshape(1, 1, -1, 1) - slots.to(torch.float32)
    return visible + torch.clamp(window - 1 - distance, max=0.0) * HIDDEN


def seen_slots(mask: Tensor, input_pos: Tensor, window: int) -> dict[str, Tensor]:
    """Return what each layer type sees of a whole cache.

    Float16 has all integers up to 2048, so positions count from the middle of caches of up to twice that; in longer
    ones a window's edge may be a slot or more off there. Integers themselves a GPU compares wrongly (docs/gpu.md).

    Shapes: mask [1,1,T,S] additive, input_pos [T] int32 -> `mask_…` [1,1,T,S] bool
    """
    length = mask.shape[3]
    middle = min(length // 2, 2048)
    slots = torch.arange(length, dtype=torch.int32) - middle
    distance = (input_pos - middle).to(torch.float32).reshape(1, 1, -1, 1) - slots.to(torch.float32)
    near = torch.where(window - distance > 0.0, mask, -HIDDEN)
    return {f"mask_{FULL}": mask > _SEEN, f"mask_{SLIDING}": near > _SEEN}


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
    """First segment of a layer that owns a cache, as far as prefill needs it of the last one: the new rows."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = KeyValueProjection(spec, layer)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, key_cache: Tensor, value_cache: Tensor
    ) -> dict[str, Tensor]:
        """Shapes: x [1,T,H], cos and sin [1,T,1,D], input_pos [T] int32, caches [1,G,S,D] -> updated caches"""
        keys, values = self.self_attn.rows(self.input_layernorm(x), (cos, sin))
        return {
            "key_cache": ops.update_cache(key_cache, keys.transpose(1, 2), input_pos),
            "value_cache": ops.update_cache(value_cache, values.transpose(1, 2), input_pos),
        }


class ReadWindow(nn.Module):
    """What sliding layers read of a cache: their window, gathered, so that its length is not that of the cache."""

    def forward(self, slots: Tensor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Shapes: slots [N] int32, keys and values [1,G,S,D] -> the same [1,G,N,D]"""
        return {"keys": ops.gather(keys, slots, 2), "values": ops.gather(values, slots, 2)}


class ReadPrefix(nn.Module):
    """What full-attention layers read of a cache in a variant for shorter contents: its first slots."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, mask: Tensor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Shapes: mask [1,1,T,S], keys and values [1,G,S,D] -> the same with S = length"""
        n = self.length
        return {"mask": mask[..., :n], "keys": keys[:, :, :n], "values": values[:, :, :n]}


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


class PositionTables:
    """All that depends on positions alone, computed once per pass and read by every layer.

    `slots` says which slots sliding layers read: with `aligned_slots` a token has the same bits in every pass
    (docs/decisions/0011). Without it, every layer reads all of a cache, and masks say what is seen: a score may be
    anything where nothing is.
    """

    def __init__(
        self, spec: DecoderSpec, position_offset: int = 0, *, slots: Callable[[Tensor, int, int], Tensor] | None
    ) -> None:
        window = spec.visible(spec.kinds[SLIDING])
        assert window is not None, "sliding layers have a window"
        self.window, self.position_offset, self.slots = window, position_offset, slots
        # Here and not in the call: values computed in float32 must not be part of what is traced.
        self.frequencies = {kind: inverse_frequencies(layer.rope, layer.head_dim) for kind, layer in spec.kinds.items()}

    def __call__(self, input_pos: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Shapes: input_pos [T] int32, mask [1,1,T,S] -> per layer type `cos_…`, `sin_…` [1,T,1,D]; `slots` [N]
        int32, the cache slots of sliding layers, and `mask_sliding_attention` [1,1,T,N]; or, without slots,
        `mask_…` [1,1,T,S] bool of both layer types"""
        if self.slots is None:
            out = seen_slots(mask, input_pos, self.window)
        else:
            slots = self.slots(input_pos, self.window, mask.shape[3])
            out = {"slots": slots, f"mask_{SLIDING}": sliding_mask(mask, slots, input_pos, self.window)}
        for kind, frequencies in self.frequencies.items():
            cos, sin = rope_tables((input_pos + self.position_offset)[None], frequencies)
            out[f"cos_{kind}"], out[f"sin_{kind}"] = cos, sin
        return out
