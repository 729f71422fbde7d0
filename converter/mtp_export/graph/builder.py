"""Collects the segments and calls of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mtp_export.graph.ir import Call, Segment, TracedGraph, TracedSignature
from mtp_export.models.layers import use_composites
from mtp_runtime.bundle.contract import PARAM_COUNT, PARAM_TENSOR, Dtype, GraphSignature, SignatureKind, TensorSpec

# The inputs of a signature: their shapes and dtypes.
Inputs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class GraphBuilder:
    """Collects segments and calls; evaluates on the meta device, so shapes are known and nothing is computed."""

    def __init__(self, role: str, *, single_buffer: bool = False, composites: bool = False) -> None:
        self.role, self.single_buffer, self.composites = role, single_buffer, composites
        self.segments: dict[str, Segment] = {}
        self.weights: dict[str, tuple[int, ...]] = {}
        self.signatures: list[TracedSignature] = []
        self._values: dict[str, Tensor] = {}
        self._calls: list[Call] = []

    def start(self, inputs: Inputs) -> None:
        """Begin a signature from its inputs' shapes and dtypes."""
        if self.single_buffer:
            inputs = {**inputs, PARAM_TENSOR: ((1, 1, 1, PARAM_COUNT), torch.int32)}
        self._values = {n: torch.empty(shape, dtype=dtype, device="meta") for n, (shape, dtype) in inputs.items()}
        self._inputs, self._calls = tuple(inputs), []

    def call(
        self,
        key: str,
        build: Callable[[], nn.Module],
        inputs: Mapping[str, str],
        outputs: Mapping[str, str] | None = None,
        *,
        prefix: str | Mapping[str, str] = "",
    ) -> None:
        """Append a call. `outputs` renames outputs (default: as they are); `prefix` maps leaves to parameters, one
        for all or one for each first word of a leaf."""
        if key not in self.segments:
            with torch.no_grad(), torch.device("meta"):
                module = build().eval().requires_grad_(False)
                if self.composites:
                    use_composites(module)
                arguments = {name: self._values[value] for name, value in inputs.items()}
                results = module(**arguments)
            self.segments[key] = Segment(module=module, inputs=arguments, outputs=results, dynamic={})
        segment = self.segments[key]
        renamed = {name: (outputs or {}).get(name, name) for name in segment.outputs}
        weights = {}
        for leaf, parameter in segment.module.named_parameters():
            before = prefix if isinstance(prefix, str) else prefix.get(leaf.partition(".")[0], "")
            weights[leaf] = before + leaf
            self.weights[before + leaf] = tuple(parameter.shape)
        self._values.update({renamed[name]: value for name, value in segment.outputs.items()})
        self._calls.append(Call(segment=key, inputs=dict(inputs), outputs=renamed, weights=weights))

    def finish(self, name: str, kind: SignatureKind, outputs: Mapping[str, str], *, num_tokens: int) -> None:
        """End the signature; `outputs` maps the names of its outputs to values."""
        signature = GraphSignature(
            name=name,
            kind=kind,
            num_tokens=num_tokens,
            inputs=tuple(self._spec(n, n) for n in self._inputs),
            outputs=tuple(self._spec(n, value) for n, value in outputs.items()),
        )
        self.signatures.append(TracedSignature(signature=signature, calls=tuple(self._calls), outputs=dict(outputs)))

    def _spec(self, name: str, value: str) -> TensorSpec:
        tensor = self._values[value]
        dtype: Dtype = "int32" if tensor.dtype == torch.int32 else "float32"
        return TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype)

    def has(self, value: str) -> bool:
        """Whether the signature has a value of this name so far."""
        return value in self._values

    def graph(self) -> TracedGraph:
        return TracedGraph(
            role=self.role, segments=self.segments, signatures=tuple(self.signatures), weights=self.weights
        )
