"""Segments → TFLite, through litert-torch (the renamed ai-edge-torch). Imported in worker processes alone: the
converter takes half a gigabyte and seconds to load.

Segments are converted many at a time, side by side in one graph, because torch.export and the converter take a second
for a graph of any size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the converter's native log is not for users
# Lower through litert-torch's own tfl ops, as its Gemma path does: fewer reshapes, and no detour through jax.
os.environ.setdefault("LITERT_TORCH_FULL_TFL_DECOMPS", "1")

import litert_torch
import torch
from litert_torch import progress
from torch import Tensor, nn

# They register how our operations are lowered.
from mtp_export.formats.tflite import cache_lowerings, composites, lowerings  # noqa: F401
from mtp_export.graph.ir import Segment


class _SideBySide(nn.Module):
    """Calls modules that have nothing to do with each other, with their parameters taken from the inputs.

    Inputs and outputs are named `s{i}.{name}`, parameters `s{i}.w.{leaf}`. The modules are held in a tuple, out of
    sight of torch.export, which would lift their parameters into the graph.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.held = tuple(modules)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for i, module in enumerate(self.held):
            inputs: dict[str, Tensor] = {}
            weights: dict[str, Tensor] = {}
            for name, value in x.items():
                scope, _, leaf = name.partition(".")
                if scope == f"s{i}":
                    (weights if leaf.startswith("w.") else inputs)[leaf.removeprefix("w.")] = value
            results = torch.func.functional_call(module, weights, (), inputs, tie_weights=False)
            out |= {f"s{i}.{name}": value for name, value in results.items()}
        return out


def _placeholder(meta: Tensor) -> Tensor:
    """Return a tensor of the shape of `meta` that occupies four bytes."""
    return torch.zeros(1, dtype=meta.dtype).expand(meta.shape)


def convert(segments: Sequence[Segment]) -> bytes:
    """Convert segments to one TFLite model of one signature; see `_SideBySide` for its names."""
    samples: dict[str, Tensor] = {}
    for i, segment in enumerate(segments):
        samples |= {f"s{i}.{name}": _placeholder(t) for name, t in segment.inputs.items()}
        samples |= {f"s{i}.w.{leaf}": _placeholder(p) for leaf, p in segment.module.named_parameters()}
    module = _SideBySide([segment.module for segment in segments]).eval()
    progress.console.quiet = True  # the pipeline reports progress itself
    converter = litert_torch.signature("segments", module, sample_kwargs={"x": samples})
    return bytes(converter.convert(strict_export=False).model_content())
