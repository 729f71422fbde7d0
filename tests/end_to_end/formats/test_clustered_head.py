"""The clustered head of several sequences as ONNX Runtime computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mtp_export.formats.onnx.convert import lower
from mtp_export.formats.onnx.write import write_onnx
from mtp_export.graph.builder import GraphBuilder
from mtp_export.graph.ir import TracedGraph
from mtp_export.models.clustered_head import BatchedClusteredHead
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.recipes import FLOAT32, INT8
from mtp_runtime.backends.onnx.opening import open_graph
from tests.support.clustered_heads import BATCH, HIDDEN, SPEC, columns_of, random_head, random_hidden


class Whole(nn.Module):
    """A head whose outputs have names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = BatchedClusteredHead(SPEC, HIDDEN, quantised=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(("candidates", "scores", "best"), self.head(x), strict=True))


def graph_of_whole() -> TracedGraph:
    builder = GraphBuilder("head")
    builder.start({"x": ((BATCH, 1, HIDDEN), torch.float32)})
    builder.call("head", Whole, {"x": "x"})
    builder.finish("head", "draft", {n: n for n in ("candidates", "scores", "best")}, num_tokens=1)
    return builder.graph()


def parameter_of(value: NDArray[Any]) -> Parameter:
    quantised = value.dtype == np.int8
    return Parameter(
        shape=value.shape,
        format=INT8 if quantised else FLOAT32,
        rows=lambda start, stop: value[start:stop],
        unit_scale=quantised,
    )


@torch.no_grad()
def test_onnx_runtime_computes_the_same(tmp_path: Path) -> None:
    hidden = random_hidden()
    head, graph = columns_of(random_head(), quantised=True), graph_of_whole()
    (lowered,) = lower([graph], 1, portable=True)
    parameters = {f"head.{name}": parameter_of(value.numpy()) for name, value in head.state_dict().items()}
    write_onnx(lowered, parameters, tmp_path / "head.onnx")
    session = open_graph(tmp_path / "head.onnx", threads=1)
    ids, scores, best = session.run(["candidates", "scores", "best"], {"x": hidden.numpy()})
    expected_ids, expected, expected_best = (value.numpy() for value in head(hidden))
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    np.testing.assert_array_equal(best, expected_best)
