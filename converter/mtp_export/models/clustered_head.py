"""The clustered head: centroid scores, best clusters, scores of the tokens of those clusters only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_export.arch.spec import ClusteredHeadSpec
from mtp_export.models import ops


class _Clusters(nn.Module):
    """The parameters of a clustered head, a row of each for each cluster; `table` is laid out by the head itself."""

    def __init__(self, spec: ClusteredHeadSpec, hidden_size: int, table: Tensor, *, row_scales: bool) -> None:
        super().__init__()
        self.spec, self.hidden_size = spec, hidden_size
        clusters, size = spec.num_centroids, spec.cluster_size
        self.centroids = nn.Linear(hidden_size, clusters, bias=False)
        self.token_ordering = nn.Parameter(torch.zeros(clusters, size, dtype=torch.int32), requires_grad=False)
        self.table = nn.Parameter(table, requires_grad=False)
        self.row_scales = nn.Parameter(torch.ones(clusters, size), requires_grad=False) if row_scales else None


class ClusteredHead(_Clusters):
    """Two-stage logit lookup over a table in cluster order.

    `table` is the drafter's tied embedding with its rows permuted by `token_ordering`, one cluster to a row, so that
    a cluster is one contiguous block. `row_scales` dequantises its tokens after the product: with it the table may
    be int8, and stays so until the multiplication. `may_draft` is 0 for tokens that are never to be drafted, else 1.
    """

    def __init__(self, spec: ClusteredHeadSpec, hidden_size: int, *, row_scales: bool) -> None:
        clusters, size = spec.num_centroids, spec.cluster_size
        super().__init__(spec, hidden_size, torch.zeros(clusters, size * hidden_size), row_scales=row_scales)
        self.may_draft = nn.Parameter(torch.ones(clusters, size), requires_grad=False)

    def candidates(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids of the best clusters, their scores, and whether they may be drafted (1 or 0).

        Shapes: hidden [1,1,H] -> ids [top_k * cluster_size] int32, scores and may_draft likewise
        """
        spec = self.spec
        hidden = hidden.reshape(1, self.hidden_size)
        clusters = ops.top_k(self.centroids(hidden), spec.top_k).reshape(spec.top_k)
        rows = ops.gather(self.table, clusters, 0).reshape(spec.num_candidates, self.hidden_size)
        scores = F.linear(hidden, rows).reshape(spec.num_candidates)
        if self.row_scales is not None:
            scores = scores * ops.gather(self.row_scales, clusters, 0).reshape(spec.num_candidates)
        ids = ops.gather(self.token_ordering, clusters, 0).reshape(spec.num_candidates)
        return ids, scores, ops.gather(self.may_draft, clusters, 0).reshape(spec.num_candidates)

    def forward(self, hidden: Tensor, drafts: Tensor) -> Tensor:
        """Return a row as long as the vocabulary, for runtimes whose sampler needs one.

        Candidates keep their differences, the worst of them gets 1, every other token 0, and so does a candidate that
        may not be drafted. transformers fills with min - 1, so this is the same row minus a constant.

        Where `drafts` is 0, token 0 is the best: it fills prompts up, so a target seldom says it (docs/decisions/0022).

        Shapes: hidden [1,1,H], drafts [1] int32, 0 or 1 -> [1,1,V]
        """
        ids, scores, may_draft = self.candidates(hidden)
        ids = ids * drafts
        shifted = (scores - (scores.min(0, keepdim=True).values - 1.0)) * may_draft
        row: Tensor = ops.scatter(ids, shifted, self.spec.vocab_size)
        return row.reshape(1, 1, self.spec.vocab_size)


class BatchedClusteredHead(_Clusters):
    """The same for any number of sequences at a time, for runtimes that take candidates as they are.

    A cluster of `table` holds its tokens as columns, so that each of them is multiplied as it was gathered. With
    `quantised` the table is int8 and `row_scales` dequantises its tokens after the product.
    """

    def __init__(self, spec: ClusteredHeadSpec, hidden_size: int, *, quantised: bool) -> None:
        dtype = torch.int8 if quantised else torch.float32
        table = torch.zeros(spec.num_centroids, hidden_size, spec.cluster_size, dtype=dtype)
        super().__init__(spec, hidden_size, table, row_scales=quantised)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the candidates of every sequence, and the winner among them.

        Shapes: hidden [B,1,H] -> ids [B,top_k * cluster_size] int32, scores likewise, best [B,1] int32
        """
        spec, batch = self.spec, hidden.shape[0]
        clusters = ops.top_k(self.centroids(hidden).squeeze(1), spec.top_k).reshape(-1)
        tokens = ops.gather(self.table, clusters, 0)
        tokens = tokens.reshape(batch, spec.top_k, self.hidden_size, spec.cluster_size)
        hidden = hidden.unsqueeze(1)
        if self.row_scales is None:
            scores = (hidden @ tokens).reshape(batch, spec.num_candidates)
        else:
            scales = ops.gather(self.row_scales, clusters, 0).reshape(batch, spec.num_candidates)
            scores = _integer_product(hidden, tokens).reshape(batch, spec.num_candidates) * scales
        ids = ops.gather(self.token_ordering, clusters, 0).reshape(batch, spec.num_candidates)
        return ids, scores, ids.gather(1, scores.argmax(-1, keepdim=True))


def _integer_product(x: Tensor, columns: Tensor) -> Tensor:
    """x @ columns with x rounded to seven bits, each sequence by its own largest value: none depends on another.

    x becomes unsigned because ONNX Runtime has its fast kernels for uint8 by int8 on x86. Seven bits because those of
    processors without VNNI add pairs of products in 16 bits: of eight, a few large ones would saturate the sum.

    Shapes: x [B,1,1,H], columns [B,N,H,P] int8 -> [B,N,1,P] float32
    """
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / (ops.ZERO_POINT - 1)
    rounded = (torch.round(x / scale) + ops.ZERO_POINT).to(torch.uint8)
    product: Tensor = ops.matmul_integer(rounded, columns)
    return product * scale
