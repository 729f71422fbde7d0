"""What the drafter has of its own: before the layers, and the clustered head after them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_export.arch.spec import SLIDING, DrafterSpec
from mtp_export.models import cache_ops
from mtp_export.models.clustered_head import ClusteredHead
from mtp_export.models.gpu_head import DelegatedClusteredHead
from mtp_export.models.layers import RMSNorm
from mtp_export.models.positions import RotaryTables, Window, filled_slots, seen_slots


class _Prologue(nn.Module):
    """Projection of the input, and rotary tables.

    `position_offset` is added to `input_pos`, the position of the last processed token: 1 is the convention of
    transformers (the position of the pending token), 0 that of vLLM. The position is constant within a round.
    """

    def __init__(self, spec: DrafterSpec, position_offset: int) -> None:
        super().__init__()
        self.rotary = RotaryTables(spec, position_offset)
        self.pre_projection = nn.Linear(2 * spec.backbone_hidden_size, spec.hidden_size, bias=False)


class DrafterPrologue(_Prologue):
    """Projection of the input, and position tables. `num_drafts`: how many tokens a round drafts; `ring` as
    `WritePlaces` has it."""

    def __init__(self, spec: DrafterSpec, position_offset: int, *, num_drafts: int, ring: int | None) -> None:
        super().__init__(spec, position_offset)
        self.window, self.num_drafts, self.ring = Window(spec, aligned=False, ring=ring), num_drafts, ring

    def forward(self, activations: Tensor, input_pos: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Shapes: activations [1,1,2*backbone] (scaled embedding of the last token, then the previous hidden state),
        input_pos [1] int32, mask [1,1,1,S] -> x [1,1,H], position tables, `drafts` [1] int32, 0 where token 0 is to be
        drafted, else 1"""
        count = cache_ops.slot_count(mask)
        seen = self.window(input_pos, mask, count) | filled_slots(input_pos, mask, count)
        tables = self.rotary(input_pos[None]) | seen | {"drafts": self._drafts(input_pos + 1, count)}
        return tables | {"x": self.pre_projection(activations)}

    def _drafts(self, pending: Tensor, count: Tensor) -> Tensor:
        """Whether a verify from `pending` on, and the token that it says behind the drafts, end before the cache does,
        and before the ring: rows behind an end are not written (`WritePlaces`). A target that says token 0 there has
        lost them (docs/decisions/0022)."""
        room = count - (pending + self.num_drafts + 1)
        if self.ring is not None:
            room = torch.minimum(room, self.ring - self.num_drafts - cache_ops.floor_mod(pending, self.ring))
        return torch.clamp(room, min=0, max=1)


class DelegatedDrafterPrologue(_Prologue):
    """The same for a GPU, which reads all of a cache."""

    def __init__(self, spec: DrafterSpec, position_offset: int) -> None:
        super().__init__(spec, position_offset)
        self.window = spec.visible(spec.kinds[SLIDING]) or 0

    def forward(self, activations: Tensor, input_pos: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Shapes: as DrafterPrologue, with masks [1,1,1,S] bool and without `drafts`"""
        tables = self.rotary(input_pos[None]) | seen_slots(mask, input_pos, self.window)
        return tables | {"x": self.pre_projection(activations)}


class DrafterHead(nn.Module):
    """Final norm, clustered head, and the projection back to the target's width that the next step is fed."""

    def __init__(self, spec: DrafterSpec, *, row_scales: bool, delegated: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        head = DelegatedClusteredHead if delegated else ClusteredHead
        self.masked_embedding = head(spec.head, spec.hidden_size, row_scales=row_scales)
        self.post_projection = nn.Linear(spec.hidden_size, spec.backbone_hidden_size, bias=False)

    def forward(self, x: Tensor, **drafts: Tensor) -> dict[str, Tensor]:
        """Shapes: x [1,1,H], drafts [1] int32 of a drafter that may hold back -> logits [1,1,V],
        projected_activations [1,1,backbone]"""
        hidden = self.norm(x)
        logits = self.masked_embedding(hidden, **drafts)
        return {"logits": logits, "projected_activations": self.post_projection(hidden)}
