"""A pair in float32 on the checkpoint's own weights, or on others: what a bundle is measured against.

It runs the segments that an export traces (their modules equal transformers, layer by layer) call by call over several
texts, and reads a parameter when a call asks for it. So memory is that of one layer, whatever the model's size, and
replacing some parameters by quantised ones, or by a bundle's, costs a dictionary.

Shapes: T tokens of a text, V vocabulary, H hidden, S cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mtp_export.arch.spec import FULL, SLIDING, TargetSpec
from mtp_export.graph.ir import Call
from mtp_export.graph.static import GraphShape, cache_shapes, trace_drafter, trace_embedder, trace_target
from mtp_export.source.pair import Pair
from mtp_export.weights import mapping
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.quantise import quantise
from mtp_export.weights.recipes import FLOAT32, RECIPES, WeightFormat
from mtp_runtime.bundle.contract import CacheName

Values = Mapping[str, Parameter]
# Called with the leaf of a segment that a matrix is, and the rows that it is multiplied with: [T, columns].
OnProduct = Callable[[str, Tensor], None]
# Called with a call, its weights by leaf, and a function that runs the call over all texts and reports its products.
# It returns the weights that the call is to have.
Refit = Callable[[Call, Mapping[str, Tensor], Callable[[OnProduct], None]], Mapping[str, Tensor]]
LOOKUPS = ("embedder", "per_layer_embedder")  # the roles of graphs that look tokens up
_PAD = 0


class TargetOutputs(NamedTuple):
    """The outputs of the target for a text. Shapes: logits [T,V], activations [T,H], caches by name [1,G,T,D]."""

    logits: NDArray[np.float32]
    activations: NDArray[np.float32]
    caches: dict[str, Tensor]


def restored(values: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the weights that quantised ones stand for. Shapes: values [R,C], scales [R,blocks] -> [R,C]"""
    blocks: NDArray[np.float32] = values.reshape(*scales.shape, -1) * scales[..., None]
    return blocks.reshape(values.shape)


def rows_of(parameter: Parameter, start: int, stop: int) -> NDArray[np.float32]:
    """Return rows of a parameter as a bundle would have them, in float32. Shapes: -> [stop - start, …]"""
    rows: NDArray[np.float32] = parameter.rows(start, stop)
    if parameter.format.bits == FLOAT32.bits or parameter.unit_scale:
        return rows
    return restored(*quantise(rows, parameter.format))


def with_format(parameter: Parameter, format: WeightFormat) -> Parameter:
    """Return a parameter that a bundle would store in another format."""
    return dataclasses.replace(parameter, format=format.for_columns(parameter.shape[-1]))


def lookup_name(role: str) -> str:
    """Return the name of an embedder's table among a target's values."""
    return f"{role} table"


class FloatTarget:
    """The target over texts of up to `length` tokens."""

    def __init__(self, pair: Pair, length: int) -> None:
        """Trace it; nothing is read yet."""
        self.spec, self.length = pair.target_spec, length
        shape = GraphShape(cache_length=length, num_draft_tokens=length - 1, prefill_lengths=(length,))
        self.graph = trace_target(self.spec, shape)
        self._caches = cache_shapes(self.spec, shape)
        embedders = [trace_embedder(self.spec, role) for role in LOOKUPS]
        graphs = [self.graph, *embedders]
        by_role = mapping.target_parameters(pair.target, graphs, RECIPES["f32"])
        # A tied embedding is a look-up table and the head: each may have a format of its own.
        self.values: Values = by_role["target"] | {
            lookup_name(role): parameter for role in LOOKUPS for parameter in by_role[role].values()
        }
        self._traced = next(t for t in self.graph.signatures if t.signature.name == "verify")
        slots = torch.arange(length)
        self._fixed = {
            "input_pos": torch.arange(length, dtype=torch.int32),
            "mask": torch.where(slots[None] <= slots[:, None], 0.0, -1e9)[None, None],
        }

    @torch.no_grad()
    def outputs(self, texts: Sequence[Sequence[int]], values: Values | None = None) -> Iterator[TargetOutputs]:
        """Yield the outputs for each text, in turn; all texts go through a layer before the next one is read.

        `values` stand in for the checkpoint's.
        """
        values = {**self.values, **(values or {})}
        everything = self.through_layers(texts, values)
        head = self._traced.calls[-1]
        weights = _weights(head, values)
        for ids, running in zip(texts, everything, strict=True):
            running.update(self._outputs(head, weights, running))
            count = len(ids)
            yield TargetOutputs(
                running["logits"][0, :count].numpy(),
                running["activations"][0, :count].numpy(),
                {str(n): _as_rows(running[n.next], n, self.spec)[:, :, :count] for n in self._caches},
            )
            running.clear()

    @torch.no_grad()
    def through_layers(
        self, texts: Sequence[Sequence[int]], values: Values, refit: Refit | None = None
    ) -> list[dict[str, Tensor]]:
        """Return the head's inputs for each text, and the caches; `refit` may change a call's weights before it."""
        everything = [dict(self._fixed) | self._embedded(ids, values) for ids in texts]
        *body, head = self._traced.calls
        for call, spent in zip(body, _spent_after(body, head), strict=True):
            weights: Mapping[str, Tensor] = _weights(call, values)
            if refit is not None:
                run = functools.partial(self._report_products, call, weights, list(zip(texts, everything, strict=True)))
                weights = refit(call, weights, run)
            for running in everything:
                running.update(self._outputs(call, weights, running))
                for name in spent:
                    running.pop(name, None)
        return everything

    def _embedded(self, ids: Sequence[int], values: Values) -> dict[str, Tensor]:
        if len(ids) > self.length:
            raise ValueError(f"a text of {len(ids)} tokens, expected at most {self.length}")
        padded = [*ids, *[_PAD] * (self.length - len(ids))]
        spec = self.spec
        tokens = _token_rows(values[lookup_name("embedder")], padded) * math.sqrt(spec.hidden_size)
        layers = _token_rows(values[lookup_name("per_layer_embedder")], padded) * math.sqrt(spec.per_layer_size)
        caches = {str(name): torch.zeros(shape) for name, shape in self._caches.items()}
        by_layer = layers.reshape(1, self.length, spec.num_layers, spec.per_layer_size)
        return caches | {"embeddings": tokens[None], "per_layer_embeddings": by_layer}

    def _outputs(self, call: Call, weights: Mapping[str, Tensor], running: Mapping[str, Tensor]) -> dict[str, Tensor]:
        module = self.graph.segments[call.segment].module
        arguments = {name: running[value] for name, value in call.inputs.items()}
        outputs = torch.func.functional_call(module, dict(weights), (), arguments)
        return {value: outputs[name] for name, value in call.outputs.items()}

    def _report_products(
        self,
        call: Call,
        weights: Mapping[str, Tensor],
        texts: Sequence[tuple[Sequence[int], Mapping[str, Tensor]]],
        on_product: OnProduct,
    ) -> None:
        module = self.graph.segments[call.segment].module
        products: dict[str, Tensor] = {}
        linear = {f"{name}.weight": m for name, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
        hooks = [m.register_forward_pre_hook(_kept_in(products, leaf)) for leaf, m in linear.items()]
        for ids, running in texts if hooks else ():
            self._outputs(call, weights, running)
            for leaf, inputs in products.items():
                on_product(leaf, inputs[0, : len(ids)])
        for hook in hooks:
            hook.remove()


def _as_rows(cache: Tensor, name: CacheName, spec: TargetSpec) -> Tensor:
    """Return a cache as rows, or rows as a cache. Shapes: [1,G,D,S] of a full layer's values -> [1,G,S,D], or back"""
    return cache.transpose(2, 3) if name.part == "v" and spec.layers[name.index].kind == FULL else cache


def _kept_in(products: dict[str, Tensor], leaf: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        products[leaf] = inputs[0]

    return hook


def _weights(call: Call, values: Values) -> dict[str, Tensor]:
    return {leaf: _whole(values[name]) for leaf, name in call.weights.items()}


def _spent_after(body: Sequence[Call], head: Call) -> list[set[str]]:
    """Return the values that no later call takes, after each call; the new caches are kept for the caller."""
    needed = set(head.inputs.values())
    spent: list[set[str]] = []
    for call in reversed(body):
        taken = set(call.inputs.values())
        spent.append({v for v in (taken | set(call.outputs.values())) - needed if not v.endswith(CacheName.NEXT)})
        needed |= taken
    return spent[::-1]


def _of_length(rows: Tensor, length: int) -> Tensor:
    """Shapes: [1,G,S',D] -> [1,G,S,D], cut or filled up"""
    return F.pad(rows[:, :, :length], (0, 0, 0, max(0, length - rows.shape[2])))


def _whole(parameter: Parameter) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows_of(parameter, 0, parameter.shape[0])))


def _token_rows(parameter: Parameter, ids: Sequence[int]) -> Tensor:
    """Shapes: ids T -> [T,…]"""
    rows = {token: rows_of(parameter, token, token + 1)[0] for token in sorted(set(ids))}
    return torch.from_numpy(np.stack([rows[token] for token in ids]))


class FloatDrafter:
    """The drafter at many positions at once, each as if a round began there, over the caches that a target filled.

    Its parameters stay in memory: they are a fiftieth of the target's.
    """

    def __init__(self, pair: Pair, cache_length: int, embedding: Parameter) -> None:
        """Trace it with both position conventions and read it; `embedding` is the target's, of tokens."""
        spec, target = pair.drafter_spec, pair.target_spec
        shape = GraphShape(cache_length=cache_length, num_draft_tokens=1, prefill_lengths=())
        self.spec, self.length, self._target = spec, cache_length, target
        self._graphs = [
            trace_drafter(spec, target, shape, position_offset=offset, row_scales=False) for offset in (0, 1)
        ]
        owners = [target.shared_cache_index(kind) for kind in (SLIDING, FULL)]
        self._read = [name for owner in owners for name in CacheName.pair(owner)]
        self.read = [str(name) for name in self._read]
        of_graph = mapping.drafter_parameters(pair.drafter, self._graphs[0], spec, RECIPES["f32"])
        self._weights = {name: _whole(p) for name, p in of_graph.items()}
        self._target_embedding, self._scale = embedding, math.sqrt(target.hidden_size)
        self.centroids = self._weights["masked_embedding.centroids.weight"]
        self.ordering = self._weights.pop("masked_embedding.token_ordering").long()
        table = self._weights.pop("masked_embedding.table").reshape(spec.vocab_size, spec.hidden_size)
        self.embedding = torch.empty_like(table)
        self.embedding[self.ordering.reshape(-1)] = table
        self.cluster_of_token = torch.empty(spec.vocab_size, dtype=torch.long)
        clusters, size = self.ordering.shape
        self.cluster_of_token[self.ordering] = torch.arange(clusters)[:, None].expand(-1, size)

    @torch.no_grad()
    def step(
        self, tokens: Sequence[int], activations: Tensor, caches: Mapping[str, Tensor], filled: int, offset: int
    ) -> tuple[Tensor, Tensor]:
        """Run one draft step at each of T consecutive positions: the first after `filled` processed tokens.

        Shapes: tokens T, activations [T,backbone], caches [1,G,S',D] of any length S' -> hidden [T,H], activations
        [T,backbone]
        """
        graph, count = self._graphs[offset], len(tokens)
        values = {
            str(name): _as_rows(_of_length(caches[str(name)], self.length), name, self._target) for name in self._read
        }
        embeddings = _token_rows(self._target_embedding, tokens) * self._scale
        seen = torch.arange(filled, filled + count)[:, None]
        values |= {
            "activations": torch.cat([embeddings, activations], -1)[None],
            "input_pos": torch.arange(filled - 1, filled - 1 + count, dtype=torch.int32),
            "mask": torch.where(torch.arange(self.length) < seen, 0.0, -1e9)[None, None],
        }
        *body, head = graph.signatures[0].calls
        for call in body:
            weights = {leaf: self._weights[name] for leaf, name in call.weights.items()}
            arguments = {name: values[value] for name, value in call.inputs.items()}
            outputs = torch.func.functional_call(graph.segments[call.segment].module, weights, (), arguments)
            values.update({value: outputs[name] for name, value in call.outputs.items()})
        x = values[head.inputs["x"]][0]
        hidden = F.rms_norm(x, x.shape[-1:], self._weights["model.norm.weight"], self.spec.rms_norm_eps)
        return hidden, hidden @ self._weights["post_projection.weight"].T

    def clusters(self, hidden: Tensor, top_k: int) -> Tensor:
        """Return the best clusters. Shapes: hidden [T,H] -> [T,top_k]"""
        return (hidden @ self.centroids.T).topk(top_k, -1).indices

    def best(self, hidden: Tensor, top_k: int) -> list[int]:
        """Return the first choice of the clustered head at each position. Shapes: hidden [T,H] -> T"""
        tokens = []
        for state, clusters in zip(hidden, self.clusters(hidden, top_k), strict=True):
            ids = self.ordering[clusters].reshape(-1)
            tokens.append(int(ids[(self.embedding[ids] @ state).argmax()]))
        return tokens

    def weight(self, name: str) -> NDArray[np.float32]:
        """Return a parameter in the form that a bundle's drafter has it in. Shapes: -> those of the bundle's"""
        if name == "masked_embedding.token_ordering":
            return self.ordering.numpy().astype(np.float32)
        if name == "masked_embedding.table":
            return self.embedding[self.ordering].reshape(len(self.ordering), -1).numpy()
        return self._weights[name].numpy()
