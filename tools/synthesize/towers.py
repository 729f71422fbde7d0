"""The vision and audio towers beside a target: their sizes and tensors, as published.

E2B and E4B have the same towers; only the projections into the target's embeddings differ. nano has none of its own:
it gets small ones.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

from mtp_export.arch import published
from tools.synthesize.layout import StoredTensor, matrix, vector

VISION_PREFIX, AUDIO_PREFIX = "model.vision_tower.", "model.audio_tower."
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionTower:
    """Sizes of the encoder of images."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    num_positions: int

    @property
    def head_dim(self) -> int:
        """Values of a head."""
        size, rest = divmod(self.hidden_size, self.num_heads)
        if rest:
            raise ValueError(f"{self.num_heads} heads do not divide a hidden size of {self.hidden_size}")
        return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioTower:
    """Sizes of the encoder of sound."""

    num_layers: int
    hidden_size: int
    num_heads: int
    conv_channels: tuple[int, int]
    conv_kernel_size: int
    output_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Towers:
    """Both encoders of a model."""

    vision: VisionTower
    audio: AudioTower


# How far from 0 a clipped layer's bounds lie. The published ones are not known. At this one, a few values in a
# thousand are clipped: a model that loses its bounds says something else.
_BOUND = 3.0
_POSITION_SPREAD = 0.5
_FEED_FORWARD = 4  # of the audio tower's hidden size; no key of a config says it
_MEL_BINS = 128

PUBLISHED = Towers(
    vision=VisionTower(
        num_layers=16, hidden_size=768, intermediate_size=3072, num_heads=12, patch_size=16, num_positions=10240
    ),
    audio=AudioTower(
        num_layers=12,
        hidden_size=1024,
        num_heads=8,
        conv_channels=(_MEL_BINS, 32),
        conv_kernel_size=5,
        output_size=1536,
    ),
)
SMALL = Towers(
    vision=VisionTower(
        num_layers=3, hidden_size=96, intermediate_size=192, num_heads=3, patch_size=16, num_positions=1024
    ),
    audio=AudioTower(
        num_layers=2, hidden_size=128, num_heads=4, conv_channels=(_MEL_BINS, 16), conv_kernel_size=5, output_size=192
    ),
)


def of(model: str) -> Towers:
    """Return the towers of a model, by the name of its pair."""
    return SMALL if model == published.NANO.name else PUBLISHED


def at_depth(towers: Towers, depth: Fraction) -> Towers:
    """Return the towers with the first layers of each, at least one; every width as it was."""
    vision, audio = towers.vision, towers.audio
    return Towers(
        vision=dataclasses.replace(vision, num_layers=max(1, round(vision.num_layers * depth))),
        audio=dataclasses.replace(audio, num_layers=max(1, round(audio.num_layers * depth))),
    )


def tensors_of(towers: Towers, hidden_size: int) -> list[StoredTensor]:
    """Both towers and their projections into embeddings of `hidden_size`, with the bounds of clipped layers."""
    return [
        *vision_tensors(towers.vision),
        *audio_tensors(towers.audio),
        matrix("model.embed_vision.embedding_projection", hidden_size, towers.vision.hidden_size),
        matrix("model.embed_audio.embedding_projection", hidden_size, towers.audio.output_size),
    ]


def vision_tensors(tower: VisionTower) -> list[StoredTensor]:
    hidden, inner, head_dim = tower.hidden_size, tower.intermediate_size, tower.head_dim
    positions = (2, tower.num_positions, hidden)
    tensors = [
        StoredTensor(name="patch_embedder.position_embedding_table", shape=positions, spread=_POSITION_SPREAD),
        matrix("patch_embedder.input_proj", hidden, 3 * tower.patch_size**2),
    ]
    for layer in range(tower.num_layers):
        name = f"encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors += _clipped(f"{name}.self_attn.{part}", hidden, hidden)
        # The scores are not scaled: the norms do it, as in the target.
        tensors += [vector(f"{name}.self_attn.{part}", head_dim, head_dim**-0.5) for part in ("q_norm", "k_norm")]
        for part in ("gate_proj", "up_proj"):
            tensors += _clipped(f"{name}.mlp.{part}", inner, hidden)
        tensors += _clipped(f"{name}.mlp.down_proj", hidden, inner)
        for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            tensors.append(vector(f"{name}.{place}_layernorm", hidden))
    return _prefixed(VISION_PREFIX, tensors)


def audio_tensors(tower: AudioTower) -> list[StoredTensor]:
    hidden, (first, second) = tower.hidden_size, tower.conv_channels
    convolutions = "subsample_conv_projection"
    tensors = [
        _convolution(f"{convolutions}.layer0.conv", first, 1, 3, 3),
        vector(f"{convolutions}.layer0.norm", first),
        _convolution(f"{convolutions}.layer1.conv", second, first, 3, 3),
        vector(f"{convolutions}.layer1.norm", second),
        matrix(f"{convolutions}.input_proj_linear", hidden, _MEL_BINS // 4 * second),
        matrix("output_proj", tower.output_size, hidden),
        StoredTensor(name="output_proj.bias", shape=(tower.output_size,), spread=0.1),
    ]
    for layer in range(tower.num_layers):
        tensors += _conformer(tower, f"layers.{layer}")
    return _prefixed(AUDIO_PREFIX, tensors)


def _conformer(tower: AudioTower, name: str) -> list[StoredTensor]:
    hidden, inner = tower.hidden_size, _FEED_FORWARD * tower.hidden_size
    tensors: list[StoredTensor] = []
    for part in ("feed_forward1", "feed_forward2"):
        tensors += _clipped(f"{name}.{part}.ffw_layer_1", inner, hidden)
        tensors += _clipped(f"{name}.{part}.ffw_layer_2", hidden, inner)
        tensors += [vector(f"{name}.{part}.{place}_layer_norm", hidden) for place in ("pre", "post")]
    for part in ("q_proj", "k_proj", "v_proj", "post"):
        tensors += _clipped(f"{name}.self_attn.{part}", hidden, hidden)
    tensors += _clipped(f"{name}.lconv1d.linear_start", 2 * hidden, hidden)
    tensors += _clipped(f"{name}.lconv1d.linear_end", hidden, hidden)
    scales = (hidden // tower.num_heads,)
    return [
        *tensors,
        StoredTensor(name=f"{name}.self_attn.per_dim_scale", shape=scales, spread=0.3),
        matrix(f"{name}.self_attn.relative_k_proj", hidden, hidden),
        _convolution(f"{name}.lconv1d.depthwise_conv1d", hidden, 1, tower.conv_kernel_size),
        *(vector(f"{name}.lconv1d.{norm}", hidden) for norm in ("pre_layer_norm", "conv_norm")),
        *(vector(f"{name}.{norm}", hidden) for norm in ("norm_pre_attn", "norm_post_attn", "norm_out")),
    ]


def _clipped(name: str, rows: int, columns: int) -> list[StoredTensor]:
    """Return a linear layer that clips what goes in and what comes out, each between two scalars."""
    return [
        matrix(f"{name}.linear", rows, columns),
        *(
            StoredTensor(name=f"{name}.{bound}", shape=(), spread=-_BOUND if bound.endswith("min") else _BOUND)
            for bound in _BOUNDS
        ),
    ]


def _convolution(name: str, *shape: int) -> StoredTensor:
    return StoredTensor(name=f"{name}.weight", shape=shape, spread=math.prod(shape[1:]) ** -0.5)


def _prefixed(prefix: str, tensors: list[StoredTensor]) -> list[StoredTensor]:
    return [dataclasses.replace(tensor, name=prefix + tensor.name) for tensor in tensors]
