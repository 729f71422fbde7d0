"""Chains of converted segments: what is one operator code, and what is not."""

from __future__ import annotations

import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from torch import Tensor, nn

from mtp_export.formats.tflite.chain import _Chain, _Template
from mtp_export.graph.builder import GraphBuilder

CODES = schema.BuiltinOperator


class Same(nn.Module):
    """Returns its input."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x.clone()}


def template(builtin: int, custom: bytes | None, version: int = 1) -> _Template:
    """Return a converted segment of one operator, from x to y."""
    model, subgraph, code = schema.ModelT(), schema.SubGraphT(), schema.OperatorCodeT()
    code.builtinCode, code.customCode, code.version = builtin, custom, version
    model.buffers, model.operatorCodes = [schema.BufferT()], [code]
    subgraph.tensors = [schema.TensorT(), schema.TensorT()]
    for tensor in subgraph.tensors:
        tensor.shape, tensor.type, tensor.buffer = np.array([1, 4], np.int32), schema.TensorType.FLOAT32, 0
    operator = schema.OperatorT()
    operator.opcodeIndex = 0
    operator.inputs, operator.outputs = np.array([0], np.int32), np.array([1], np.int32)
    return _Template(
        model=model, subgraph=subgraph, operators=[operator], inputs={"x": 0}, weights={}, outputs={"y": 1}
    )


def chain(first: _Template, second: _Template) -> schema.ModelT:
    """Return the model of a chain of two segments."""
    builder = GraphBuilder("target")
    builder.start({"x": ((1, 4), torch.float32)})
    builder.call("first", Same, {"x": "x"})
    builder.call("second", Same, {"x": "y"}, {"y": "z"})
    builder.finish("decode", "decode", {"out": "z"}, num_tokens=1)
    return _Chain(builder.graph(), {"first": first, "second": second}).lowered().model


def test_custom_operators_of_two_names_stay_two() -> None:
    model = chain(template(CODES.CUSTOM, b"one"), template(CODES.CUSTOM, b"other"))
    codes = [model.operatorCodes[operator.opcodeIndex] for operator in model.subgraphs[0].operators]
    assert [code.customCode for code in codes] == [b"one", b"other"]


def test_operators_of_one_kind_and_version_share_a_code() -> None:
    """A converter leaves no name or an empty one."""
    assert len(chain(template(CODES.ABS, None), template(CODES.ABS, b"")).operatorCodes) == 1
    assert len(chain(template(CODES.ABS, None), template(CODES.ABS, None, version=2)).operatorCodes) == 2
