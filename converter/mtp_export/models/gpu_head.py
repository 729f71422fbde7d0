"""The clustered head in operations that a GPU delegate takes as well: it has no scatter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_export.arch.spec import ClusteredHeadSpec
from mtp_export.models import ops


class DelegatedClusteredHead(nn.Module):
    """ClusteredHead's row of logits without scattering candidates to their ids.

    A product with the chosen clusters' unit vectors puts the scores at their clusters' places, and `token_places`, the
    inverse of `token_ordering`, gathers the row of the vocabulary from that. A GPU does both in some microseconds;
    on a CPU the gather of every token costs more than the scatter of the candidates.
    """

    def __init__(self, spec: ClusteredHeadSpec, hidden_size: int, *, row_scales: bool) -> None:
        super().__init__()
        self.spec, self.hidden_size = spec, hidden_size
        clusters, size = spec.num_centroids, spec.cluster_size
        self.centroids = nn.Linear(hidden_size, clusters, bias=False)
        self.token_places = nn.Parameter(torch.zeros(spec.vocab_size, dtype=torch.int32), requires_grad=False)
        self.table = nn.Parameter(torch.zeros(clusters, size * hidden_size), requires_grad=False)
        self.row_scales = nn.Parameter(torch.ones(clusters, size), requires_grad=False) if row_scales else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the row that ClusteredHead gives.

        Shapes: hidden [1,1,H] -> [1,1,V]
        """
        spec = self.spec
        hidden = hidden.reshape(1, self.hidden_size)
        clusters = ops.top_k(self.centroids(hidden), spec.top_k).reshape(spec.top_k)
        rows = ops.gather(self.table, clusters, 0).reshape(spec.num_candidates, self.hidden_size)
        scores = F.linear(hidden, rows)
        if self.row_scales is not None:
            scores = scores * ops.gather(self.row_scales, clusters, 0).reshape(1, spec.num_candidates)
        # The minimum over the last of two axes: delegates refuse tensors without an axis.
        shifted = scores - (scores.amin(1, keepdim=True) - 1.0)
        every = torch.arange(spec.num_centroids, dtype=torch.int32).reshape(spec.num_centroids, 1)
        chosen = torch.where(every == clusters.reshape(1, spec.top_k), 1.0, 0.0)
        placed = chosen[None] @ shifted.reshape(1, spec.top_k, spec.cluster_size)
        row: Tensor = ops.gather(placed.reshape(spec.vocab_size), self.token_places, 0)
        return row.reshape(1, 1, spec.vocab_size)
