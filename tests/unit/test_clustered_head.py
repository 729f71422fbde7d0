"""The clustered head of several sequences: against the one of a single row, and as ONNX Runtime computes it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mtp_export.arch.spec import ClusteredHeadSpec
from mtp_export.formats.onnx.convert import lower
from mtp_export.formats.onnx.write import write_onnx
from mtp_export.graph.builder import GraphBuilder
from mtp_export.graph.ir import TracedGraph
from mtp_export.models.clustered_head import BatchedClusteredHead, ClusteredHead
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.quantise import quantise
from mtp_export.weights.recipes import FLOAT32, INT8
from mtp_runtime.backends.onnx.opening import open_graph

SPEC = ClusteredHeadSpec(num_centroids=16, top_k=4, vocab_size=128)
HIDDEN, BATCH = 32, 3


@pytest.fixture(scope="module")
def hidden() -> Tensor:
    # Sizes that differ from sequence to sequence: a scale shared among them would round the small ones away.
    sizes = torch.tensor([1.0, 100.0, 0.01]).reshape(BATCH, 1, 1)
    return torch.randn(BATCH, 1, HIDDEN, generator=torch.Generator().manual_seed(1)) * sizes


@pytest.fixture(scope="module")
def rows() -> ClusteredHead:
    generator = torch.Generator().manual_seed(2)
    head = ClusteredHead(SPEC, HIDDEN, row_scales=False)
    nn.init.normal_(head.centroids.weight, generator=generator)
    nn.init.normal_(head.table, generator=generator)
    ordering = torch.randperm(SPEC.vocab_size, generator=generator).to(torch.int32)
    head.token_ordering.data = ordering.reshape(SPEC.num_centroids, -1)
    return head


def columns_of(rows: ClusteredHead, *, quantised: bool) -> BatchedClusteredHead:
    """The same weights, tokens as columns."""
    head = BatchedClusteredHead(SPEC, HIDDEN, quantised=quantised)
    state = {name: value for name, value in rows.state_dict().items() if name != "may_draft"}
    tokens = state["table"].reshape(SPEC.vocab_size, HIDDEN)
    if quantised:
        values, scales = quantise(tokens.numpy(), INT8)
        tokens, state["row_scales"] = torch.tensor(values), torch.tensor(scales).reshape(SPEC.num_centroids, -1)
    state["table"] = tokens.reshape(SPEC.num_centroids, -1, HIDDEN).transpose(1, 2)
    head.load_state_dict(state)
    return head


@torch.no_grad()
def test_every_sequence_has_the_candidates_of_a_row_alone(rows: ClusteredHead, hidden: Tensor) -> None:
    ids, scores, best = columns_of(rows, quantised=False)(hidden)
    for b in range(BATCH):
        expected_ids, expected, _ = rows.candidates(hidden[b : b + 1])
        assert ids[b].equal(expected_ids)
        torch.testing.assert_close(scores[b], expected, atol=0, rtol=1e-4)  # sums in another order
        assert best[b] == expected_ids[expected.argmax()]


@torch.no_grad()
def test_quantised_scores_are_close_and_each_sequence_s_own(rows: ClusteredHead, hidden: Tensor) -> None:
    head = columns_of(rows, quantised=True)
    ids, scores, best = head(hidden)
    for b in range(BATCH):
        expected_ids, expected, _ = rows.candidates(hidden[b : b + 1])
        assert ids[b].equal(expected_ids)
        # Half a step of x at every weight, half a step of the table at every x, added up as if none cancelled.
        step = hidden[b].abs().max() / 126
        table = rows.table.abs().max() / 254
        bound = HIDDEN * (step * rows.table.abs().mean() + table * hidden[b].abs().mean()) * 2
        assert (scores[b] - expected).abs().max() < bound
        assert np.corrcoef(scores[b], expected)[0, 1] > 0.999
        for together, alone in zip((ids, scores, best), head(hidden[b : b + 1]), strict=True):
            assert together[b].equal(alone[0])


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
    builder.finish("head", "draft", {n: n for n in ("candidates", "scores", "best")}, num_tokens=1, attention_length=0)
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
def test_onnx_runtime_computes_the_same(rows: ClusteredHead, hidden: Tensor, tmp_path: Path) -> None:
    head, graph = columns_of(rows, quantised=True), graph_of_whole()
    (lowered,) = lower([graph], 1, portable=True)
    parameters = {f"head.{name}": parameter_of(value.numpy()) for name, value in head.state_dict().items()}
    write_onnx(lowered, parameters, tmp_path / "head.onnx")
    session = open_graph(tmp_path / "head.onnx", threads=1)
    ids, scores, best = session.run(["candidates", "scores", "best"], {"x": hidden.numpy()})
    expected_ids, expected, expected_best = (value.numpy() for value in head(hidden))
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    np.testing.assert_array_equal(best, expected_best)


@torch.no_grad()
def test_a_token_that_may_not_be_drafted_scores_as_one_that_is_no_candidate(
    rows: ClusteredHead, hidden: Tensor
) -> None:
    before = rows(hidden[:1])[0, 0]
    best = int(before.argmax())
    hides = copy.deepcopy(rows)
    hides.may_draft.data = (hides.token_ordering != best).float()
    after = hides(hidden[:1])[0, 0]
    assert after[best] == 0
    others = torch.arange(len(before)) != best
    assert after[others].equal(before[others])
