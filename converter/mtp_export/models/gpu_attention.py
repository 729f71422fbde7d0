"""Attention over caches that a GPU writes in place and reads as far as they are filled.

LiteRT-LM's GPU backend keeps one set of caches where a signature has an input `param_tensor`: it says which slots a
pass writes and how many are filled then. Without it there are two sets, and every pass copies all of the caches from
one to the other. Keys are [1,G,S,D] and values [1,G,D,S], because the kernels sum both products over the last axis of
the cache (docs/decisions/0016-single-buffer.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_export.models import ops
from mtp_export.models.attention import Attend, OwnerRows, folded_heads, unfolded_heads
from mtp_export.models.positions import HIDDEN


def cache_starts(input_pos: Tensor) -> dict[str, Tensor]:
    """Where the first row of a pass belongs in keys and in values, by axis. Every layer reads them.

    Shapes: input_pos [T] int32 -> key_start and value_start [4] int32
    """
    first = input_pos[:1]
    zeros = [torch.tensor([0] * n, dtype=torch.int32) for n in (1, 2, 3)]
    return {"key_start": torch.cat([zeros[1], first, zeros[0]]), "value_start": torch.cat([zeros[2], first])}


class DelegatedOwnerRows(OwnerRows):
    """OwnerRows, writing in place."""

    def forward(  # type: ignore[override]
        self, x: Tensor, cos: Tensor, sin: Tensor, params: Tensor, **places: Tensor
    ) -> dict[str, Tensor]:
        """Shapes: x [1,T,H], cos and sin [1,T,1,D], params [1,1,1,7] int32; places: key_cache [1,G,S,D], value_cache
        [1,G,D,S], key_start and value_start [4] int32 -> updated caches"""
        rows = [part.transpose(1, 2) for part in self.self_attn.rows(self.input_layernorm(x), (cos, sin))]
        caches = [places["key_cache"], places["value_cache"]]
        starts = [places["key_start"], places["value_start"]]
        keys, values = ops.cache_update(rows, params, caches, starts)
        return {"key_cache": keys, "value_cache": values}


class DelegatedAttend(Attend):
    """Attend over all filled slots. What lies beyond them is not computed, so scores there are selected away, not
    added to."""

    def forward(  # type: ignore[override]
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, params: Tensor
    ) -> dict[str, Tensor]:
        """Shapes: query [1,T,heads,D], keys [1,G,S,D], values [1,G,D,S], mask [1,1,T,S] bool, params [1,1,1,7] int32
        -> attended [1,T,H]"""
        folded = folded_heads(query, keys.shape[1])
        scores = ops.runtime_bmm(folded, keys, params, False)
        scores = scores.reshape(1, query.shape[2], query.shape[1], keys.shape[2])
        weights = torch.softmax(torch.where(mask, scores, -HIDDEN), -1).reshape(*folded.shape[:3], keys.shape[2])
        out = ops.runtime_bmm(weights, values, params, True)
        return {"attended": self.self_attn.o_proj(unfolded_heads(out, query))}
