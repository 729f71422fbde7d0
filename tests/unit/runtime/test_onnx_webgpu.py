"""What can be known of the WebGPU provider without a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mtp_runtime import UserError
from mtp_runtime.backends.onnx import webgpu
from mtp_runtime.backends.onnx.buffers import HostRows
from mtp_runtime.backends.onnx.opening import pooled_options
from mtp_runtime.backends.onnx.pooled_cache import SLIDING_SLOTS, PooledKVCache
from mtp_runtime.bundle.contract import TensorSpec
from mtp_runtime.errors import BundleError
from mtp_runtime.generate.backend import FloatArray


def test_without_the_provider_one_line_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"not installed.*: pip install 'mtp-export\[webgpu\]'$"):
        webgpu.find_device("a_package_that_nobody_has")


def test_a_norm_gets_a_scale_for_every_element(tmp_path: Path) -> None:
    scales = {"one": np.array([0.5], np.float32), "each": np.arange(1, 5, dtype=np.float32)}
    nodes = [helper.make_node("RMSNormalization", ["x", name], [f"y_{name}"], name=name, axis=-1) for name in scales]
    graph = helper.make_graph(
        nodes,
        "norms",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT, ["rows", 4]) for name in scales],
        initializer=[numpy_helper.from_array(value, name) for name, value in scales.items()],
    )
    path = tmp_path / "norms.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 23)]), path)
    whole = webgpu.with_whole_scales(path)

    used = [node.input[1] for node in onnx.load_from_string(whole).graph.node if node.op_type == "RMSNormalization"]
    assert used == ["y_one/scale", "each"]
    feeds = {"x": np.linspace(-2, 3, 12, dtype=np.float32).reshape(3, 4)}
    outputs = ["y_one", "y_each", "y_one/scale"]
    with_scale = onnx.load_from_string(whole)
    with_scale.graph.output.append(helper.make_tensor_value_info("y_one/scale", TensorProto.FLOAT, [4]))
    outputs_of_whole = _run(with_scale.SerializeToString(), outputs, feeds)
    expected = _run(path.read_bytes(), outputs[:2], feeds)
    np.testing.assert_array_equal(outputs_of_whole[2], np.full(4, 0.5, np.float32))
    for ours, theirs in zip(outputs_of_whole, expected, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def _run(model: bytes, outputs: list[str], feeds: dict[str, FloatArray]) -> list[FloatArray]:
    session = ort.InferenceSession(model, pooled_options(2), providers=["CPUExecutionProvider"])
    results: list[FloatArray] = session.run(outputs, feeds)
    return results


class ElsewhereRows(HostRows):
    """Rows that are copied out, as those in a GPU's memory are."""

    def read(self) -> FloatArray:
        return super().read().copy()


def _cache_elsewhere() -> tuple[PooledKVCache, dict[str, HostRows]]:
    specs = [
        TensorSpec(name="full", shape=(1, 2, "full_slots", 3), dtype="float32"),
        TensorSpec(name="sliding", shape=(1, 2, SLIDING_SLOTS, 3), dtype="float32"),
    ]
    bound: dict[str, HostRows] = {}

    def allocate(name: str, shape: tuple[int, ...]) -> HostRows:
        bound[name] = ElsewhereRows(shape)
        return bound[name]

    return PooledKVCache(specs, 64, 8, 4, allocate), bound


def test_rows_that_are_copied_out_are_those_that_were_written() -> None:
    random = np.random.default_rng(0)
    cache, bound = _cache_elsewhere()
    written = {name: np.zeros((1, 2, 0, 3), np.float32) for name in cache.names}
    rewound = 0
    for step in range(40):
        if cache.filled_length + 3 > 60:
            cache.rewind(5 + step)
            written = {name: rows[:, :, : 5 + step] for name, rows in written.items()}
            rewound += 1
        cache.settle(3)
        for name, first in (("full", 0), ("sliding", cache.first_position)):
            rows = random.standard_normal((1, 2, 3, 3), np.float32)
            start = cache.filled_length - first
            bound[name].value.numpy()[:, :, start : start + 3] = rows
            written[name] = np.concatenate([written[name], rows], axis=2)
        cache.advance(3)
        for name in cache.names:
            np.testing.assert_array_equal(cache.rows(name), written[name])
    assert rewound > 0
    fresh, _ = _cache_elsewhere()
    fresh.restore(written)
    for name in fresh.names:
        np.testing.assert_array_equal(fresh.rows(name), written[name])


def test_a_damaged_graph_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "target.onnx"
    path.write_bytes(b"\xff\xff no graph")
    with pytest.raises(BundleError, match=r"^target.onnx is a damaged ONNX model .*: export it again$"):
        webgpu.with_whole_scales(path)
