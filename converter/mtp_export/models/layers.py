"""Building blocks that target and drafter share; names of parameters are the published ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_export.arch.spec import DecoderSpec, LayerSpec, RopeSpec
from mtp_export.models import ops


class Composable(nn.Module):
    """A module that is exported as fewer operators where `composites` is true (docs/decisions/0015-composites.md)."""

    composites = False


def use_composites(module: nn.Module) -> None:
    """Set `composites` in all parts of a module, in place."""
    for part in module.modules():
        if isinstance(part, Composable):
            part.composites = True


class RMSNorm(Composable):
    """x / rms(x) * weight over the last axis; Gemma 4 stores the weight itself, not weight - 1."""

    def __init__(self, size: int, eps: float, *, scale: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [...,N] -> [...,N]"""
        norm = ops.rms_norm_composite if self.composites else ops.rms_norm
        out: Tensor = norm(x, self.weight, self.eps)
        return out


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), with the tanh form of gelu."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [B,T,H] -> [B,T,H]"""
        out: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return out


class FeedForward(nn.Module):
    """Last segment of a layer: residuals, gated MLP and the layer's scalar."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec) -> None:
        super().__init__()
        hidden, eps = spec.hidden_size, spec.rms_norm_eps
        self.mlp = GatedMLP(hidden, layer.intermediate_size)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        self.layer_scalar = nn.Parameter(torch.ones(1), requires_grad=False)

    def residuals(self, x: Tensor, attended: Tensor) -> Tensor:
        """Shapes: x and attended [1,T,H] -> [1,T,H]"""
        x = x + self.post_attention_layernorm(attended)
        out: Tensor = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return out

    def forward(self, x: Tensor, attended: Tensor) -> dict[str, Tensor]:
        """Shapes: x and attended [1,T,H] -> x [1,T,H]"""
        return {"x": self.residuals(x, attended) * self.layer_scalar}


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> list[float]:
    """Return inverse frequencies of the rotated pairs, zeros for the unrotated ones.

    In "proportional" RoPE the exponent's denominator stays the whole head size, as in transformers'
    `_compute_proportional_rope_parameters`.

    Computed in float32, as transformers does; a list, so that they enter a traced graph as a constant.

    Shapes: -> [D/2]
    """
    rotated = int(rope.partial_rotary_factor * head_dim // 2)
    exponent = torch.arange(0, 2 * rotated, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies: list[float] = (1.0 / rope.theta**exponent).tolist()
    return frequencies + [0.0] * (head_dim // 2 - rotated)


def rope_tables(positions: Tensor, frequencies: list[float]) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine for positions: the sine of the first half is negated, so that a rotation is
    x * cos + swap_halves(x) * sin.

    Shapes: positions [B,T] int32, frequencies [D/2] -> two of [B,T,1,D]
    """
    angles = positions.to(torch.float32)[..., None, None] * torch.tensor(frequencies, dtype=torch.float32)
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor], *, by_lookup: bool = False) -> Tensor:
    """Apply rotary tables; with `by_lookup`, the halves are swapped by one look-up and not by two slices.

    Shapes: x [1,T,heads,D], tables of [1,T,1,D] -> [1,T,heads,D]
    """
    cos, sin = tables
    size, half = x.shape[-1], x.shape[-1] // 2
    if by_lookup:
        order = torch.tensor([*range(half, size), *range(half)], dtype=torch.int32)
        swapped: Tensor = ops.gather(x, order, x.dim() - 1)
        return x * cos + swapped * sin
    return x * cos + torch.cat([x[..., half:], x[..., :half]], -1) * sin
