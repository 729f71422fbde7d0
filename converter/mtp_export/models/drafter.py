"""What the drafter has of its own: before the layers, and the clustered head after them."""

from __future__ import annotations

from torch import Tensor, nn

from mtp_export.arch.spec import DrafterSpec
from mtp_export.models.attention import PositionTables, sliding_slots
from mtp_export.models.clustered_head import ClusteredHead
from mtp_export.models.gpu_head import DelegatedClusteredHead
from mtp_export.models.layers import RMSNorm


class DrafterPrologue(nn.Module):
    """Projection of the input, and position tables.

    `position_offset` is added to `input_pos`, the position of the last processed token: 1 is the convention of
    transformers (the position of the pending token), 0 that of vLLM. The position is constant within a round.
    """

    def __init__(self, spec: DrafterSpec, position_offset: int, *, single_buffer: bool = False) -> None:
        super().__init__()
        self.tables = PositionTables(spec, position_offset, slots=None if single_buffer else sliding_slots)
        self.pre_projection = nn.Linear(2 * spec.backbone_hidden_size, spec.hidden_size, bias=False)

    def forward(self, activations: Tensor, input_pos: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Shapes: activations [1,1,2*backbone] (scaled embedding of the last token, then the previous hidden state),
        input_pos [1] int32, mask [1,1,1,S] -> x [1,1,H], position tables"""
        return self.tables(input_pos, mask) | {"x": self.pre_projection(activations)}


class DrafterHead(nn.Module):
    """Final norm, clustered head, and the projection back to the target's width that the next step is fed."""

    def __init__(self, spec: DrafterSpec, *, row_scales: bool, delegated: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        head = DelegatedClusteredHead if delegated else ClusteredHead
        self.masked_embedding = head(spec.head, spec.hidden_size, row_scales=row_scales)
        self.post_projection = nn.Linear(spec.hidden_size, spec.backbone_hidden_size, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Shapes: x [1,1,H] -> logits [1,1,V], projected_activations [1,1,backbone]"""
        hidden = self.norm(x)
        return {"logits": self.masked_embedding(hidden), "projected_activations": self.post_projection(hidden)}
