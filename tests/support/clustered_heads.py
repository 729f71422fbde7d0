"""Small random clustered heads, of one row and of several sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_export.arch.spec import ClusteredHeadSpec
from mtp_export.models.clustered_head import BatchedClusteredHead, ClusteredHead
from mtp_export.weights.quantise import quantise
from mtp_export.weights.recipes import INT8

SPEC = ClusteredHeadSpec(num_centroids=16, top_k=4, vocab_size=128)
HIDDEN, BATCH = 32, 3


def random_hidden() -> Tensor:
    """Return hidden states (BATCH, 1, HIDDEN)."""
    # Sizes that differ from sequence to sequence: a scale shared among them would round the small ones away.
    sizes = torch.tensor([1.0, 100.0, 0.01]).reshape(BATCH, 1, 1)
    return torch.randn(BATCH, 1, HIDDEN, generator=torch.Generator().manual_seed(1)) * sizes


def random_head() -> ClusteredHead:
    """Return a head of one row, tokens as rows."""
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
