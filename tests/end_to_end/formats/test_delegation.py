"""What a GPU would take of a bundle, said without one; and the head that it takes, against the other."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from mtp_export.arch.spec import ClusteredHeadSpec
from mtp_export.formats.tflite.gpu_table import DelegateTable, delegate_table, open_graph, read_graph, refusals
from mtp_export.models.clustered_head import ClusteredHead
from mtp_export.models.gpu_head import DelegatedClusteredHead
from mtp_runtime import Session
from mtp_runtime.errors import BundleError
from tests.conftest import Export, run_cli

SCATTER = "SCATTER_ND(int32[n,1], float32[n], const int32[1]) -> float32[n]"


@torch.no_grad()
def test_the_delegated_head_gives_the_same_row() -> None:
    spec, hidden_size = ClusteredHeadSpec(num_centroids=16, top_k=4, vocab_size=128), 32
    generator = torch.Generator().manual_seed(1)
    ours = ClusteredHead(spec, hidden_size, row_scales=True)
    for parameter in ours.parameters():
        if parameter.dtype == torch.float32 and parameter is not ours.may_draft:
            nn.init.normal_(parameter, generator=generator)
    ordering = torch.randperm(spec.vocab_size, generator=generator).to(torch.int32)
    ours.token_ordering.data = ordering.reshape(spec.num_centroids, -1)
    theirs = DelegatedClusteredHead(spec, hidden_size, row_scales=True)
    state = {name: value for name, value in ours.state_dict().items() if name not in ("token_ordering", "may_draft")}
    theirs.load_state_dict(state | {"token_places": torch.argsort(ordering).to(torch.int32)})
    hidden = torch.randn(1, 1, hidden_size, generator=generator)
    row = theirs(hidden)
    assert int((row != 0).sum()) == spec.num_candidates
    torch.testing.assert_close(row, ours(hidden, torch.ones(1, dtype=torch.int32)))


def test_a_bundle_for_the_gpu_is_wholly_delegated_and_one_for_the_cpu_is_not(export_nano: Export) -> None:
    for_gpu, for_cpu = export_nano("int8", export_format="tflite-gpu"), export_nano("int8")
    done = run_cli("inspect", str(for_gpu), "--delegate", "gpu", "--json")
    report = json.loads(done.stdout)
    assert report["wholly_delegated"] is True
    assert report["graphs"] == {"target": [], "drafter": []}

    done = run_cli("inspect", str(for_cpu / "nano.litertlm"), "--json", check=False)
    report = json.loads(done.stdout)
    assert (done.returncode, report["wholly_delegated"]) == (1, False)
    # What is computed of positions, and the reads of what is filled, were not tried on a GPU.
    passes = {name for refusal in report["graphs"]["target"] for name in refusal["signatures"]}
    assert passes == {"prefill_16", "prefill_128", "decode", "verify"}
    reasons = {refusal["form"]: refusal["reason"] for refusal in report["graphs"]["drafter"]}
    assert reasons[SCATTER] == "SCATTER_ND: Operation is not supported."
    assert all("never run" in reason for form, reason in reasons.items() if form != SCATTER)
    done = run_cli("inspect", str(for_cpu), check=False)
    assert re.search(r"drafter: \d\d operators are left to the CPU", done.stdout)


def test_both_bundles_generate_the_same_tokens(export_nano: Export) -> None:
    """The delegated head is another way to the same drafts, on the CPU too."""
    traces = []
    for export_format in ("tflite", "tflite-gpu"):
        with Session.open(export_nano("int8", export_format=export_format)) as session:
            traces.append(session.generate("class Stack:\n    def push(self", max_new_tokens=32).finish())
    assert traces[0].tokens == traces[1].tokens
    assert traces[0].stats.accepted == traces[1].stats.accepted > 0


def test_an_untried_form_counts_as_refused(export_nano: Export) -> None:
    graph = open_graph(export_nano("int8") / "embedder.tflite")
    known = delegate_table("gpu")
    assert refusals(graph, known) == []
    forms = {operator.form for operator in graph.operators()}
    nothing = DelegateTable(backend="gpu", learnt={}, reasons={})
    assert {refusal.form for refusal in refusals(graph, nothing)} == forms
    assert all("never run" in refusal.reason for refusal in refusals(graph, nothing))


def test_the_table_tells_its_origin() -> None:
    table = delegate_table("gpu")
    assert table.learnt["machine"]["driver"]
    assert table.learnt["commit"]
    assert SCATTER in table.reasons


def test_what_is_no_model_is_one_line() -> None:
    with pytest.raises(BundleError, match="no TFLite model"):
        read_graph(b"", "nothing")
    with pytest.raises(BundleError, match="damaged"):
        read_graph(b"\xff\xff\xff\x7fTFL3" + bytes(8), "damage")
