"""A finished ONNX graph of one sequence → the graph of several, over the same data file.

Whatever works on one token at a time does so on the tokens of all sequences together: that is what a batch saves.
Attention alone is done sequence by sequence, each over caches of its own, bound in place as those of one sequence are.
So sequences may be of any lengths, each pass may take another number of tokens from each, and nothing is padded.
(GroupQueryAttention has a batch dimension too, but onnxruntime 1.32 refuses it where a pass has several tokens.)
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

from mtp_export.formats.onnx.convert import value_info
from mtp_runtime.bundle.contract import (
    ROW_COUNTS,
    TOKEN_COUNTS,
    GraphSignature,
    for_sequences,
    of_sequence,
    output_name,
)

_INPUTS_OF_ROWS = 3  # query, key and value; what follows belongs to a sequence
_BATCH, _TOKENS = 0, 1  # axes of rows


def write_batched(path: Path, signature: GraphSignature, sequences: int, batched: Path) -> None:
    """Write the graph of several sequences at `batched`, beside that of one at `path`, whose data it uses."""
    model = _batched(onnx.load(str(path), load_external_data=False), signature, sequences)
    batched.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(batched), full_check=True)


def _batched(model: onnx.ModelProto, signature: GraphSignature, sequences: int) -> onnx.ModelProto:
    """Return `model`, which has the signature `signature`, with that of `contract.for_sequences(signature)`."""
    signature = for_sequences(signature, sequences)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    nodes = list(graph.node)
    del graph.node[:]
    target = any(spec.name == TOKEN_COUNTS for spec in signature.inputs)
    if target:
        for name in (TOKEN_COUNTS, ROW_COUNTS):
            graph.node.append(helper.make_node("Cast", [name], [f"{name}/Cast"], f"{name}/Cast", to=TensorProto.INT64))
    else:
        graph.initializer.append(helper.make_tensor("one_each", TensorProto.INT64, (sequences,), [1] * sequences))
    for node in nodes:
        if node.op_type == "GroupQueryAttention":
            # Behind the last layer that writes, the tokens are those whose logits are wanted.
            counts = f"{ROW_COUNTS if _only_reads(node) else TOKEN_COUNTS}/Cast" if target else "one_each"
            graph.node.extend(_attention(node, counts, _TOKENS if target else _BATCH, sequences))
        else:
            graph.node.append(node)
    del graph.input[:], graph.output[:]
    graph.input.extend(value_info(spec, spec.name) for spec in signature.inputs)
    graph.output.extend(value_info(spec, output_name(spec.name)) for spec in signature.outputs)
    return copy


def _only_reads(node: NodeProto) -> bool:
    """Whether a layer writes no rows: one value of no tokens is its keys and values."""
    return bool(node.input[1] == node.input[2])


def _attention(node: NodeProto, counts: str, axis: int, sequences: int) -> list[NodeProto]:
    """The nodes that take the place of one attention: its rows are split, attended to apart, and joined."""
    numbers = range(sequences)
    rows = dict(zip(node.input[:_INPUTS_OF_ROWS], ("query", "key", "value"), strict=True))
    if _only_reads(node) and axis == _TOKENS:  # its keys and values suit every sequence as they are
        del rows[node.input[1]]
    parts = {name: [f"{node.name}/{label}.{i}" for i in numbers] for name, label in rows.items()}
    made = [
        helper.make_node("Split", [name, counts], parts[name], f"{node.name}/{label}/Split", axis=axis)
        for name, label in rows.items()
    ]
    attended = [f"{node.output[0]}.{i}" for i in numbers]
    for i in numbers:
        part = NodeProto()
        part.CopyFrom(node)
        part.name = f"{node.name}.{i}"
        own = [of_sequence(name, i) for name in node.input[_INPUTS_OF_ROWS:]]
        part.input[:] = [parts[name][i] if name in parts else name for name in node.input[:_INPUTS_OF_ROWS]] + own
        part.output[:] = [attended[i], *(of_sequence(name, i) for name in node.output[1:])]
        made.append(part)
    made.append(helper.make_node("Concat", attended, [node.output[0]], f"{node.name}/Concat", axis=axis))
    return made
