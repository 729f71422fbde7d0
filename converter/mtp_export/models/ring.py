"""A ring that was taken back too far ends the answer, instead of giving a wrong one.

The cache of a sliding layer may be a ring of slots, and a runtime that takes a text back by more than the ring keeps
would read rows of other positions there. LiteRT-LM does take texts back, and asks nobody. So one more cache holds the
position of each slot. Where one within the window is not what it must be, the token that ends an answer gets the
highest logit, and the positions that are written are none, so that all that follows ends too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_export.arch.spec import TargetSpec
from mtp_export.models import cache_ops, ops
from mtp_export.models.positions import counted, written
from mtp_export.models.target import TargetHead

_NOWHERE = 1e6  # taken off a position makes it none
_ABOVE_ALL = 1e6  # above every logit


class RingCheck(nn.Module):
    """Compares the positions in the window before a pass with what they must be, and writes its own."""

    def __init__(self, window: int, ring: int) -> None:
        super().__init__()
        self.before, self.ring = window - 1, ring

    def forward(self, input_pos: Tensor, positions: Tensor, **where: Tensor) -> dict[str, Tensor]:
        """Shapes: input_pos [T] int32, positions [1,1,R,1], where as `positions.written` takes it -> positions, and
        lost [1], 1 where a row within the window is that of another position, else 0"""
        first, num_tokens = input_pos[:1], input_pos.shape[0]
        expected = first - self.before + counted(self.before)
        positions_there = ops.gather(positions, cache_ops.floor_mod(expected, self.ring), 2).reshape(self.before)
        within = torch.clamp(expected + 1, min=0, max=1).to(torch.float32)  # 0 before the first position
        wrong = torch.abs(positions_there - expected.to(torch.float32)) * within
        lost = torch.clamp(wrong.amax(0, keepdim=True), max=1.0)
        # Not input_pos: a runtime may say anything of rows that fill a pass up.
        rows = (first + counted(num_tokens)).to(torch.float32) - lost * _NOWHERE
        return {"positions": written(positions, rows.reshape(1, 1, num_tokens, 1), where, 2), "lost": lost}


class EndingHead(TargetHead):
    """A head that says `end_token` where rows are lost."""

    def __init__(self, spec: TargetSpec, end_token: int) -> None:
        super().__init__(spec)
        self.end_token, self.vocab_size = end_token, spec.vocab_size

    def forward(self, x: Tensor, lost: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Shapes: x [1,T,H], lost [1] -> activations [1,T,H], logits [1,T,V]"""
        out = super().forward(x)
        end = torch.tensor([self.end_token], dtype=torch.int32)
        return {**out, "logits": out["logits"] + ops.scatter(end, lost * _ABOVE_ALL, self.vocab_size)}
