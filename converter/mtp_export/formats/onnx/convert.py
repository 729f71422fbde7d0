"""TracedGraph → LoweredGraph for ONNX Runtime: segments are exported by torch.onnx, then chained.

Every parameter is an initializer without data; `onnx_weights.py` turns the operations that read quantised ones into
those of ONNX Runtime, and streams the data to a file beside the graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import onnx
import torch
from onnx import TensorProto, helper
from onnxscript import opset23
from onnxscript.values import Op, Opset
from torch import Tensor, nn

from mtp_export.formats.segment_cache import cached_results
from mtp_export.graph.ir import Call, Segment, TracedGraph
from mtp_export.models import ops
from mtp_runtime.bundle.contract import TensorSpec, output_name

OPSET = 23  # the first with RMSNormalization
IR_VERSION = 11  # the first with opset 23
MICROSOFT_DOMAIN = "com.microsoft"


def _group_query_attention() -> Op:
    """ONNX Runtime's operation (its contrib operators have no schema in the onnx package)."""
    schema = onnx.defs.OpSchema
    names = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length")
    types = {name: "M" if name in ("seqlens_k", "total_sequence_length") else "T" for name in names}
    return Op(
        Opset(MICROSOFT_DOMAIN, 1),
        "GroupQueryAttention",
        schema(
            "GroupQueryAttention",
            MICROSOFT_DOMAIN,
            1,
            inputs=[schema.FormalParameter(name, type_str) for name, type_str in types.items()],
            outputs=[schema.FormalParameter(name, "T") for name in ("output", "present_key", "present_value")],
            type_constraints=[("T", ["tensor(float)"], ""), ("M", ["tensor(int32)"], "")],
            attributes=[
                schema.Attribute("num_heads", schema.AttrType.INT),
                schema.Attribute("kv_num_heads", schema.AttrType.INT),
                schema.Attribute("local_window_size", schema.AttrType.INT),
                schema.Attribute("scale", schema.AttrType.FLOAT),
            ],
        ),
    )


_attention_in_place = _group_query_attention()
op: Any = opset23  # its types know Python values as arguments only where they are lists of tensors
_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoweredGraph:
    """An ONNX model whose parameters are named but have no data, and their shapes."""

    role: str
    model: onnx.ModelProto
    weights: Mapping[str, tuple[int, ...]]


def lower(
    graphs: Sequence[TracedGraph],
    workers: int,
    *,
    portable: bool,
    on_segments: Callable[[int], None] = lambda count: None,
) -> list[LoweredGraph]:
    """Export graphs; `portable` keeps to standard operations, whose attention costs as much as the cache is long.

    `on_segments` is told how many segments are done.
    """
    names = [(number, key) for number, graph in enumerate(graphs) for key in graph.segments]
    jobs = [(graphs[number].segments[key], portable) for number, key in names]
    templates: dict[tuple[int, str], _Template] = {}
    with contextlib.closing(cached_results(_convert, jobs, workers)) as results:
        for name, content in zip(names, results, strict=True):
            templates[name] = msgspec.msgpack.decode(content, type=_Template)
            on_segments(1)
    return [
        _Chain(graph, {key: templates[number, key] for key in graph.segments}).lowered()
        for number, graph in enumerate(graphs)
    ]


class _WithInputs(nn.Module):
    """A module whose parameters are inputs too, named `w.{leaf}`; held out of sight of torch.export."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = (module,)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = {name.removeprefix("w."): value for name, value in x.items() if name.startswith("w.")}
        inputs = {name: value for name, value in x.items() if not name.startswith("w.")}
        results: dict[str, Tensor] = torch.func.functional_call(self.held[0], weights, (), inputs, tie_weights=False)
        return results


class _Template(msgspec.Struct, frozen=True, kw_only=True):
    """An exported segment: its graph, and which values of that are the segment's inputs, weights and outputs."""

    serialised: bytes
    inputs: dict[str, str]
    weights: dict[str, str]
    outputs: dict[str, str]

    @property
    def graph(self) -> onnx.GraphProto:
        graph = onnx.GraphProto()
        graph.ParseFromString(self.serialised)
        return graph


def _convert(job: tuple[Segment, bool]) -> bytes:
    segment, portable = job
    sample = {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in segment.inputs.items()}
    leaves = dict(segment.module.named_parameters())
    sample |= {f"w.{leaf}": torch.zeros((), dtype=p.dtype).expand(p.shape) for leaf, p in leaves.items()}
    dims = {name: dict.fromkeys(segment.dynamic.get(name, ()), torch.export.Dim.DYNAMIC) for name in sample}
    with _quiet():
        exported = torch.export.export(_WithInputs(segment.module), (sample,), dynamic_shapes=(dims,))
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            custom_translation_table=_translations(portable),
        )
    assert program is not None
    graph = program.model_proto.graph
    names = dict(zip(sample, (value.name for value in graph.input), strict=True))
    outputs = dict(zip(segment.outputs, (value.name for value in graph.output), strict=True))
    return msgspec.msgpack.encode(
        _Template(
            serialised=graph.SerializeToString(),
            inputs={name: names[name] for name in segment.inputs},
            weights={leaf: names[f"w.{leaf}"] for leaf in leaves},
            outputs=outputs,
        )
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks (torchvision is absent, a class is deprecated) off the user's screen."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _translations(portable: bool) -> dict[Any, Callable[..., Any]]:
    mtp = torch.ops.mtp
    return {
        mtp.gather.default: lambda x, indices, axis: op.Gather(x, indices, axis=axis),
        mtp.matmul_transposed.default: lambda x, y: op.MatMul(x, op.Transpose(y, perm=[0, 2, 1])),
        mtp.matmul_integer.default: _matmul_integer,
        mtp.top_k.default: _top_k,
        mtp.rms_norm.default: _rms_norm,
        mtp.write_and_attend.default: _portable_write_and_attend if portable else _write_and_attend,
        mtp.attend.default: _portable_attend if portable else _attend,
    }


def _matmul_integer(x: Any, y: Any) -> Any:
    zero_point = op.Constant(value=helper.make_tensor("zero_point", TensorProto.UINT8, (), [ops.ZERO_POINT]))
    return op.Cast(op.MatMulInteger(x, y, zero_point), to=TensorProto.FLOAT)


def _top_k(x: Any, k: int) -> Any:
    _, indices = op.TopK(x, op.Constant(value_ints=[k]), axis=-1)
    return op.Cast(indices, to=TensorProto.INT32)


def _rms_norm(x: Any, weight: Any, eps: float) -> Any:
    if weight is None:
        weight = op.Constant(value_floats=[1.0])
    return op.RMSNormalization(x, weight, axis=-1, epsilon=eps)


def _write_and_attend(query: Any, rows: Any, caches: Any, fill: Any, num_heads: int, window: int) -> Any:
    return _attention_in_place(query, *rows, *caches, *fill, **_attributes(caches[0], num_heads, window))


def _attend(query: Any, caches: Any, fill: Any, num_heads: int, window: int) -> Any:
    # No rows of its own: the operation then only reads the caches.
    groups, size = caches[0].shape[1], caches[0].shape[3]
    none = op.Slice(query, [0, 0], [0, groups * size], [1, 2])
    return _write_and_attend(query, (none, none), caches, fill, num_heads, window)


def _attributes(keys: Any, num_heads: int, window: int) -> dict[str, Any]:
    return {
        "num_heads": num_heads,
        "kv_num_heads": keys.shape[1],
        "scale": 1.0,
        "local_window_size": window or -1,
    }


def _portable_write_and_attend(query: Any, rows: Any, caches: Any, fill: Any, num_heads: int, window: int) -> Any:
    slots, heads = _slots(query, fill[0]), _Heads.of(caches[0], num_heads)
    keys, values = (_scatter(cache, new, slots) for cache, new in zip(caches, rows, strict=True))
    return _attention(query, (keys, values), heads, slots, window), keys, values


def _portable_attend(query: Any, caches: Any, fill: Any, num_heads: int, window: int) -> Any:
    out = _attention(query, caches, _Heads.of(caches[0], num_heads), _slots(query, fill[0]), window)
    return out, *(op.Identity(cache) for cache in caches)


@dataclasses.dataclass(frozen=True)
class _Heads:
    """How a row is split: `count` heads of a query over `groups` heads of keys and values, each of `size`."""

    count: int
    groups: int
    size: int

    @classmethod
    def of(cls, cache: Any, count: int) -> _Heads:
        """Return the heads over a cache [B,G,S,D]."""
        return cls(count=count, groups=cache.shape[1], size=cache.shape[3])


def _slots(query: Any, last: Any) -> Any:
    """Return the slot of each token. Shapes: query [B,T,heads*D], last [B] int32 -> [B,T] int64"""
    tokens = op.Squeeze(op.Shape(query, start=1, end=2))
    back = op.Range(op.Sub(op.Constant(value_int=1), tokens), op.Constant(value_int=1), op.Constant(value_int=1))
    return op.Add(op.Unsqueeze(op.Cast(last, to=TensorProto.INT64), [1]), back)


def _scatter(cache: Any, rows: Any, slots: Any) -> Any:
    """Write rows at their slots. Shapes: cache [B,G,S,D], rows [B,T,G*D], slots [B,T] -> [B,G,S,D]"""
    groups, size = cache.shape[1], cache.shape[3]
    rows = op.Transpose(op.Reshape(rows, [0, 0, groups, size]), perm=[0, 2, 1, 3])
    index = op.Expand(op.Unsqueeze(slots, [1, 3]), op.Shape(rows))
    return op.ScatterElements(cache, index, rows, axis=2)


def _attention(query: Any, caches: Any, heads: _Heads, slots: Any, window: int) -> Any:
    """softmax(query @ keys^T) @ values over the whole cache, what is not seen hidden.

    Shapes: query [B,T,heads*D], caches two of [B,G,S,D], slots [B,T] -> [B,T,heads*D]
    """
    keys, values = caches
    split = [0, 0, heads.groups, heads.count // heads.groups, heads.size]
    folded = op.Transpose(op.Reshape(query, split), perm=[0, 2, 3, 1, 4])
    scores = op.MatMul(folded, op.Transpose(op.Unsqueeze(keys, [2]), perm=[0, 1, 2, 4, 3]))
    length = op.Squeeze(op.Shape(keys, start=2, end=3))
    slot = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    at = op.Unsqueeze(slots, [1, 2, 4])
    seen = op.LessOrEqual(slot, at)
    if window:
        seen = op.And(seen, op.Greater(slot, op.Sub(at, op.Constant(value_int=window))))
    scores = op.Where(seen, scores, op.Constant(value_float=-1e9))
    out = op.MatMul(op.Softmax(scores, axis=-1), op.Unsqueeze(values, [2]))
    return op.Reshape(op.Transpose(out, perm=[0, 3, 1, 2, 4]), [0, 0, heads.count * heads.size])


class _Chain:
    """Copies exported segments, call by call, into one graph whose nodes are named by where they belong."""

    def __init__(self, graph: TracedGraph, templates: Mapping[str, _Template]) -> None:
        self.graph, self.templates = graph, templates
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[bytes, str] = {}
        self.initializers: list[TensorProto] = []

    def lowered(self) -> LoweredGraph:
        traced = self.graph
        (signature,) = traced.signatures
        values = {spec.name: spec.name for spec in signature.signature.inputs}
        produced = {value: name for name, value in signature.outputs.items()}
        number: dict[str, int] = {}
        for call in signature.calls:
            scope = _scope(call)
            repeats = number[scope] = number.get(scope, 0) + 1
            self._add(call, values, produced, f"{traced.role}/{scope}" + (f".{repeats}" if repeats > 1 else ""))
        graph = helper.make_graph(
            self.nodes,
            traced.role,
            [value_info(spec, spec.name) for spec in signature.signature.inputs],
            [value_info(spec, output_name(spec.name)) for spec in signature.signature.outputs],
            initializer=self.initializers,
        )
        domains = sorted({node.domain for node in self.nodes})
        model = helper.make_model(
            graph,
            producer_name="mtp-export",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid(domain, OPSET if domain == "" else 1) for domain in domains],
        )
        return LoweredGraph(role=traced.role, model=model, weights=traced.weights)

    def _add(self, call: Call, values: dict[str, str], produced: Mapping[str, str], scope: str) -> None:
        template = self.templates[call.segment]
        renamed = {"": ""}
        renamed |= {inner: values[call.inputs[name]] for name, inner in template.inputs.items()}
        renamed |= {inner: call.weights[leaf] for leaf, inner in template.weights.items()}
        graph = template.graph
        for tensor in graph.initializer:
            renamed[tensor.name] = self._constant(tensor)
        for name, inner in template.outputs.items():
            value = call.outputs[name]
            values[value] = renamed[inner] = _renamed_output(produced.get(value), f"{scope}/{name}")
        seen: dict[str, int] = {}
        for old in graph.node:
            new = onnx.NodeProto()
            new.CopyFrom(old)
            del new.metadata_props[:]
            new.ClearField("doc_string")
            count = seen[old.op_type] = seen.get(old.op_type, 0) + 1
            new.name = f"{scope}/{old.op_type}" + (f"_{count}" if count > 1 else "")
            for i, name in enumerate(old.output):
                renamed.setdefault(name, f"{new.name}:{i}" if i else new.name)
            new.input[:] = [renamed[name] for name in old.input]
            new.output[:] = [renamed[name] for name in old.output]
            self.nodes.append(new)

    def _constant(self, tensor: TensorProto) -> str:
        """Name of an initializer with this value; equal constants of all segments are one."""
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.ClearField("name")
        copy.ClearField("doc_string")
        key = copy.SerializeToString(deterministic=True)
        if key not in self.constants:
            copy.name = self.constants[key] = f"constant_{len(self.constants)}"
            self.initializers.append(copy)
        return self.constants[key]


def _scope(call: Call) -> str:
    """Where a call belongs, as in the checkpoint: `layers.3/attn`, `head`."""
    parameter = next(iter(call.weights.values()), "")
    _, layers, rest = parameter.partition("layers.")
    part = call.segment.partition("_")[0]
    part = {"owner": "attn", "reader": "attn", "feed": "mlp"}.get(part, part)
    return f"layers.{rest.partition('.')[0]}/{part}" if layers else part


def _renamed_output(output: str | None, inner: str) -> str:
    if output is None:
        return inner
    return output_name(output)


def value_info(spec: TensorSpec, name: str) -> onnx.ValueInfoProto:
    """Declare a graph's input or output."""
    return helper.make_tensor_value_info(name, _TYPES[spec.dtype], list(spec.shape))
