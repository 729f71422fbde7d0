"""Traced graphs: segments, and the calls that a signature is a chain of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtp_runtime.bundle.contract import GraphSignature


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A module to trace: `module(**inputs) -> dict`, its parameters on the meta device.

    inputs and outputs: tensors on the meta device, which carry shape and dtype. dynamic: axes of inputs whose size may
    vary, by the name of the input.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    dynamic: Mapping[str, frozenset[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One use of a segment: which value of the signature each input and output is, which parameter each leaf."""

    segment: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    weights: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedSignature:
    """A signature and the calls that compute it.

    The values it starts from are named as its inputs; `outputs` maps the names of its outputs to values.
    """

    signature: GraphSignature
    calls: tuple[Call, ...]
    outputs: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedGraph:
    """One file of the bundle. `weights` gives the shape of every parameter that any signature uses."""

    role: str
    segments: Mapping[str, Segment]
    signatures: tuple[TracedSignature, ...]
    weights: Mapping[str, tuple[int, ...]]


def run_signature(
    graph: TracedGraph, traced: TracedSignature, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Compute a signature in torch, as the exported graph does.

    Returns:
        Every value, intermediate ones included, by name.
    """
    values = dict(inputs)
    for call in traced.calls:
        module = graph.segments[call.segment].module
        parameters = {leaf: weights[name] for leaf, name in call.weights.items()}
        arguments = {name: values[value] for name, value in call.inputs.items()}
        outputs = torch.func.functional_call(module, parameters, (), arguments)
        values.update({value: outputs[name] for name, value in call.outputs.items()})
    return values
