"""Caches for a GPU: one buffer of each, written by an operator of its own and read as far as it is filled.

What such an operator is told is read by GPUs alone: no output on a CPU depends on it, so it is looked at here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flatbuffers import flexbuffers

from mtp_export.formats.tflite.gpu_table import open_graph
from mtp_runtime import BundleError, Manifest, Session, read_manifest
from mtp_runtime.backends.litert.static import BoundSignature, StaticBackend, StaticGraphs
from mtp_runtime.bundle.consistency import check_consistency
from tests.conftest import Export
from tests.support.operators import operator_counts

Document = dict[str, Any]


def test_nothing_else_touches_a_cache(export_nano: Export) -> None:
    folder = export_nano("int8", export_format="tflite-gpu")
    manifest = read_manifest(folder)
    for role, signature, written, products, others in (
        ("target", "prefill_128", 5, 8, 0),
        ("target", "decode", 5, 20, 0),
        ("target", "verify", 5, 20, 0),
        ("drafter", "draft", 0, 8, 1),  # one of the clustered head
    ):
        counts = operator_counts(open_graph(folder / f"{role}.tflite"), signature)
        assert counts["STABLEHLO_COMPOSITE odml.cache_update"] == written, signature
        assert counts["STABLEHLO_COMPOSITE odml.runtime_bmm"] == products, signature
        assert (counts["DYNAMIC_UPDATE_SLICE"], counts["BATCH_MATMUL"]) == (0, others), signature
        tensors = {tensor.name: tensor.shape for tensor in manifest.signature(role, signature).inputs}
        assert tensors["param_tensor"] == (1, 1, 1, 7)
        (layer,) = {name[-1] for name in tensors if name.startswith("kv_cache_k_4")}
        assert tensors[f"kv_cache_v_{layer}"] == tuple(np.array(tensors[f"kv_cache_k_{layer}"])[[0, 1, 3, 2]])


def test_composites_have_the_attributes_of_their_cache(export_nano: Export) -> None:
    model = open_graph(export_nano("int8", export_format="tflite-gpu") / "target.tflite").model
    entry = next(entry for entry in model.signatureDefs if entry.signatureKey == b"verify")
    subgraph = model.subgraphs[entry.subgraphIndex]
    inputs = {int(item.tensorIndex): item.name.decode() for item in entry.inputs}
    outputs = {int(item.tensorIndex): item.name.decode() for item in entry.outputs}
    updates, products = [], []
    for operator in subgraph.operators:
        options = operator.builtinOptions2
        if options is None:
            continue
        attributes = flexbuffers.Loads(bytes(options.compositeAttributes))
        tensors = [int(i) for i in operator.inputs]
        if options.name == b"odml.cache_update":
            assert [inputs.get(i) for i in tensors[2:5]] == [
                "param_tensor",
                *(outputs[int(i)] for i in operator.outputs),
            ]
            rows = [[int(n) for n in subgraph.tensors[i].shape] for i in tensors[:2]]
            updates.append((inputs[tensors[3]], inputs[tensors[4]], attributes, rows))
        else:
            assert options.name == b"odml.runtime_bmm"
            assert inputs[tensors[2]] == "param_tensor"
            products.append((outputs[tensors[1]], attributes))
    sizes = [128 if layer == 4 else 64 for layer in range(5)]
    assert updates == [
        (
            f"kv_cache_k_{layer}",
            f"kv_cache_v_{layer}",
            {"kv_cache_batch_size": 1, "cache_size": 1024, "head_size": size, "is_ring_buffer": False},
            [[1, 1, 5, size]] * 2,
        )
        for layer, size in enumerate(sizes)
    ]
    for name, attributes in products:
        of_values = name.startswith("kv_cache_v_")
        assert attributes == {"is_global": True, "is_src": of_values, "rhs_cache_update": True}


class RecordingSignature:
    """Implements BoundSignature by another one, and records the parameters of each pass."""

    def __init__(self, signature: BoundSignature, records: list[tuple[str, list[int]]]) -> None:
        self.spec, self.run, self.read = signature.spec, signature.run, signature.read
        self._write, self._records = signature.write, records

    def write(self, name: str, values: Any) -> None:
        if name == "param_tensor":
            self._records.append((self.spec.name, np.ravel(values).tolist()))
        self._write(name, values)


class RecordingGraphs:
    """Implements StaticGraphs by others."""

    def __init__(self, graphs: StaticGraphs) -> None:
        self.kv_cache, self.close = graphs.kv_cache, graphs.close
        self.records: list[tuple[str, list[int]]] = []
        self._graphs = graphs

    def bound(self, role: str, name: str) -> RecordingSignature:
        return RecordingSignature(self._graphs.bound(role, name), self.records)


def test_the_parameters_of_each_pass(export_nano: Export) -> None:
    with Session.open(export_nano("int8", export_format="tflite-gpu")) as session:
        assert isinstance(session.backend, StaticBackend)
        graphs = RecordingGraphs(session.backend.graphs)
        backend = StaticBackend(graphs, session.manifest)
        backend.prefill((5, 6, 7))
        passed = backend.verify((8,))
        backend.verify((8, 9))  # of a signature for five
        backend.draft(9, passed.activations[0])
        backend.kv_cache.advance(2)
        backend.draft(9, passed.activations[0])
    assert graphs.records == [
        ("prefill_16", [0, 3, 3, 0, 0, 0, 0]),
        ("decode", [3, 4, 4, 0, 0, 0, 0]),
        ("verify", [3, 5, 5, 0, 0, 0, 0]),
        ("draft", [2, 3, 3, 0, 0, 0, 0]),
        ("draft", [4, 5, 5, 0, 0, 0, 0]),
    ]


def without_params(signature: Document) -> None:
    signature["inputs"] = [tensor for tensor in signature["inputs"] if tensor["name"] != "param_tensor"]


def with_slots_before_rows(signature: Document) -> None:
    (values,) = (tensor for tensor in signature["inputs"] if tensor["name"] == "kv_cache_v_0")
    values["shape"] = [values["shape"][axis] for axis in (0, 1, 3, 2)]


@pytest.mark.parametrize(
    ("edit", "name", "message"),
    [
        (without_params, "verify", "target verify: among its inputs, param_tensor is absent"),
        (without_params, "decode", r"target prefill_16: among its inputs, param_tensor is .*, expected absent"),
        (with_slots_before_rows, "decode", r"kv_cache_v_0 is \(1, 1, 1024, 64\), expected \(1, 1, 64, 1024\)"),
    ],
)
def test_a_manifest_that_contradicts_itself(
    edit: Callable[[Document], None], name: str, message: str, export_nano: Export
) -> None:
    manifest = read_manifest(export_nano("int8", export_format="tflite-gpu"))
    check_consistency(manifest)
    document = json.loads(manifest.to_json())
    edit(next(signature for signature in document["signatures"]["target"] if signature["name"] == name))
    with pytest.raises(BundleError, match=message):
        check_consistency(Manifest.from_json(json.dumps(document)))


@pytest.mark.parametrize("role", ["target", "drafter"])
def test_nothing_unused_is_left_behind(role: str, export_nano: Export) -> None:
    graph = open_graph(export_nano("int8", export_format="tflite-composites") / f"{role}.tflite")
    for subgraph in graph.model.subgraphs:
        used = {int(i) for owner in (subgraph, *subgraph.operators) for i in (*owner.inputs, *owner.outputs)}
        assert used - {-1} == set(range(len(subgraph.tensors)))
        needed = {int(i) for i in subgraph.outputs} | {int(i) for o in subgraph.operators for i in o.inputs}
        assert all(needed & {int(i) for i in operator.outputs} for operator in subgraph.operators)
