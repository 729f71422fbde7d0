"""A `.litertlm` of some kilobytes that LiteRT-LM opens in milliseconds: any tokenizer and template, and a graph that
only has the shape of a model. What the runtime makes of a template is seen there, whatever the size of the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from litert_lm_builder.litertlm_builder import LitertLmFileBuilder, TfLiteModelType
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from mtp_runtime.bundle.contract import CacheName

STUB_CONTEXT = 64
_PREFILL = 16
_FLOAT, _INT = schema.TensorType.FLOAT32, schema.TensorType.INT32
_CACHES = tuple(map(str, CacheName.pair(0)))


def write_stub(path: Path, template: str, tokenizer: Path) -> None:
    """Write a stub with a chat template and a tokenizer.json."""
    metadata = llm_metadata_pb2.LlmMetadata()
    metadata.stop_tokens.add().token_ids.ids.append(1)
    metadata.max_num_tokens = STUB_CONTEXT
    metadata.llm_model_type.gemma4.SetInParent()
    metadata.jinja_prompt_template = template
    builder = LitertLmFileBuilder()
    with tempfile.TemporaryDirectory(prefix="mtp-stub-") as folder:
        graph, message = Path(folder) / "stub.tflite", Path(folder) / "metadata.pb"
        graph.write_bytes(_graph())
        message.write_bytes(metadata.SerializeToString())
        builder.add_llm_metadata(str(message))
        builder.add_hf_tokenizer(str(tokenizer))
        builder.add_tflite_model(str(graph), TfLiteModelType.PREFILL_DECODE)
        with path.open("wb") as file:
            builder.build(file)


def _graph() -> bytes:
    """Prefill and decode with the tensors that the runtime looks for; each output is twice a cache."""
    model = schema.ModelT()
    model.version = 3
    empty = schema.BufferT()
    empty.data = np.zeros(0, np.uint8)
    model.buffers = [empty]
    add = schema.OperatorCodeT()
    add.builtinCode = add.deprecatedBuiltinCode = schema.BuiltinOperator.ADD
    add.version = 1
    model.operatorCodes = [add]
    model.subgraphs, model.signatureDefs = [], []
    for name, tokens, outputs in ((f"prefill_{_PREFILL}", _PREFILL, {}), ("decode", 1, {"logits": _CACHES[0]})):
        _add_signature(model, name, tokens, {**dict(zip(_CACHES, _CACHES, strict=True)), **outputs})
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _add_signature(model: Any, name: str, tokens: int, outputs: Mapping[str, str]) -> None:
    graph, signature = schema.SubGraphT(), schema.SignatureDefT()
    graph.name, graph.tensors, graph.operators = name, [], []
    signature.signatureKey, signature.subgraphIndex = name, len(model.subgraphs)

    def tensor(shape: list[int], kind: int) -> int:
        made = schema.TensorT()
        made.name, made.shape, made.type = f"tensor_{len(graph.tensors)}", np.array(shape, np.int32), kind
        made.buffer, made.hasRank = 0, True
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    def entry(key: str, index: int) -> Any:
        made = schema.TensorMapT()
        made.name, made.tensorIndex = key, index
        return made

    inputs = {"tokens": tensor([1, tokens], _INT), "input_pos": tensor([tokens], _INT)}
    inputs["mask"] = tensor([1, 1, tokens, STUB_CONTEXT], _FLOAT)
    inputs |= {cache: tensor([1, 1, STUB_CONTEXT], _FLOAT) for cache in _CACHES}
    made = {}
    for key, source in outputs.items():
        made[key] = tensor([1, 1, STUB_CONTEXT], _FLOAT)
        operator = schema.OperatorT()
        operator.opcodeIndex = 0
        operator.inputs, operator.outputs = np.array([inputs[source]] * 2, np.int32), np.array([made[key]], np.int32)
        operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.AddOptions, schema.AddOptionsT()
        graph.operators.append(operator)
    signature.inputs = [entry(key, index) for key, index in inputs.items()]
    signature.outputs = [entry(key, index) for key, index in made.items()]
    graph.inputs = np.array(list(inputs.values()), np.int32)
    graph.outputs = np.array(list(made.values()), np.int32)
    model.subgraphs.append(graph)
    model.signatureDefs.append(signature)
