"""Caches for a GPU: written by an operator of their own, and read as far as they are filled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from mtp_export.delegation import Graph, open_graph
from mtp_export.filled_caches import with_filled_caches
from mtp_export.lower.tflite import LoweredGraph
from mtp_runtime import BundleError, Manifest, read_manifest
from mtp_runtime.consistency import check_consistency
from mtp_runtime.contract import param_tensor
from tests.conftest import Export

Document = dict[str, Any]


def counts(graph: Graph, signature: str) -> Counter[str]:
    number = graph.signature_names().index(signature)
    return Counter(operator.form.partition("(")[0] for operator in graph.operators() if operator.subgraph == number)


def test_nothing_else_touches_a_cache(export_nano: Export) -> None:
    folder = export_nano("int8", export_format="tflite-gpu")
    manifest = read_manifest(folder)
    for role, signature, written, products in (
        ("target", "prefill_128", 5, 8),
        ("target", "decode", 5, 20),
        ("target", "verify", 5, 20),
        ("drafter", "draft", 0, 8),
    ):
        found = counts(open_graph(folder / f"{role}.tflite"), signature)
        assert found["STABLEHLO_COMPOSITE odml.cache_update"] == written, signature
        assert found["STABLEHLO_COMPOSITE odml.runtime_bmm"] == products, signature
        assert not {"DYNAMIC_UPDATE_SLICE", "BATCH_MATMUL"} & set(found), signature
        tensors = {tensor.name: tensor.shape for tensor in manifest.signature(role, signature).inputs}
        assert tensors["param_tensor"] == (1, 1, 1, 7)
        (layer,) = {name[-1] for name in tensors if name.startswith("kv_cache_k_4")}
        assert tensors[f"kv_cache_v_{layer}"] == tuple(np.array(tensors[f"kv_cache_k_{layer}"])[[0, 1, 3, 2]])
    assert {spec.attention_length for spec in manifest.signatures["target"]} == {manifest.cache_length}


def test_what_a_pass_is_told() -> None:
    assert param_tensor(5, 10).tolist() == [[[[5, 10, 10, 0, 0, 0, 0]]]]


def without_params(signature: Document) -> None:
    signature["inputs"] = [tensor for tensor in signature["inputs"] if tensor["name"] != "param_tensor"]


def with_slots_before_rows(signature: Document) -> None:
    (values,) = (tensor for tensor in signature["inputs"] if tensor["name"] == "kv_cache_v_0")
    values["shape"] = [values["shape"][axis] for axis in (0, 1, 3, 2)]


@pytest.mark.parametrize(
    ("edit", "name", "message"),
    [
        (without_params, "verify", "target verify: among its inputs, param_tensor is absent"),
        (without_params, "decode", r"kv_cache_v_0 is \(1, 1, 64, 1024\), expected \(1, G, 1024, D\)"),
        (with_slots_before_rows, "decode", r"kv_cache_v_0 is \(1, 1, 1024, 64\), expected \(1, G, D, 1024\)"),
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


def test_a_cache_that_another_operator_reads_is_no_gpu_s(export_nano: Export) -> None:
    """A bundle for a CPU gathers windows; such a graph is refused, and not half rewritten."""
    graph = open_graph(export_nano("int8") / "drafter.tflite")
    model = graph.model
    for subgraph, entry in zip(model.subgraphs, model.signatureDefs, strict=True):
        params = schema.TensorT()
        params.name, params.shape, params.type, params.buffer = b"param_tensor", np.array([1, 1, 1, 7]), 2, 0
        subgraph.tensors.append(params)
        item = schema.TensorMapT()
        item.name, item.tensorIndex = b"param_tensor", len(subgraph.tensors) - 1
        entry.inputs.append(item)
    with pytest.raises(AssertionError, match="a cache is used by operators"):
        with_filled_caches(LoweredGraph(role="drafter", model=model, weights={}))


def test_nothing_unused_is_left_behind(export_nano: Export) -> None:
    graph = open_graph(export_nano("int8", export_format="tflite-composites") / "drafter.tflite")
    for subgraph in graph.model.subgraphs:
        used = {int(i) for owner in (subgraph, *subgraph.operators) for i in (*owner.inputs, *owner.outputs)}
        assert used - {-1} == set(range(len(subgraph.tensors)))
