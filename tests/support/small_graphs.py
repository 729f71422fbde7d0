"""Small graphs of real segments with random weights."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray

from mtp_export.arch.published import NANO
from mtp_export.graph.builder import GraphBuilder
from mtp_export.graph.ir import TracedGraph
from mtp_export.models.layers import FeedForward
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.recipes import FLOAT32, WeightFormat


def feed_forward_graph() -> TracedGraph:
    """One feed-forward block of nano's drafter over three tokens."""
    spec = NANO.drafter
    builder = GraphBuilder("feed_forward")
    shape = (1, 3, spec.hidden_size)
    builder.start({"x": (shape, torch.float32), "attended": (shape, torch.float32)})
    builder.call(
        "feed_forward",
        lambda: FeedForward(spec, spec.layers[0]),
        {"x": "x", "attended": "attended"},
        {"x": "out"},
        prefix="layer.",
    )
    builder.finish("block", "decode", {"out": "out"}, num_tokens=3)
    return builder.graph()


def random_parameters(graph: TracedGraph, format: WeightFormat) -> dict[str, Parameter]:
    """Seeded values for every parameter; vectors stay float32."""

    def parameter(name: str, shape: tuple[int, ...]) -> Parameter:
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)

        def rows(start: int, stop: int) -> NDArray[np.float32]:
            return values[start:stop].copy()

        return Parameter(shape=shape, format=FLOAT32 if len(shape) == 1 else format, rows=rows)

    return {name: parameter(name, shape) for name, shape in graph.weights.items()}
