"""The walk over the layers of a model: the same for target and drafter, in static and in dynamic graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from mtp_export.arch.spec import DecoderSpec, DrafterSpec, LayerSpec, TargetSpec
from mtp_export.graph.builder import GraphBuilder
from mtp_export.models.layers import FeedForward
from mtp_export.models.target import TargetFeedForward
from mtp_runtime.bundle.contract import CacheName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A layer in its model. `cache` is the index of the KV cache that it writes or reads; `prefix` begins the names of
    its parameters."""

    spec: DecoderSpec
    layer: LayerSpec
    number: int
    cache: int
    prefix: str

    @property
    def caches(self) -> tuple[CacheName, CacheName]:
        """Names of the keys and the values of the layer's cache."""
        return CacheName.pair(self.cache)


class Attention(Protocol):
    """How the layers of a graph attend, and how the names of what depends on the pass end."""

    @property
    def segment_suffix(self) -> str:
        """Ends the keys of segments."""
        ...

    @property
    def value_suffix(self) -> str:
        """Ends the names of values that belong to the pass's tokens."""
        ...

    def own(self, place: Place, x: str) -> str:
        """Append the attention of a layer that owns a cache; return the name of the attended value."""
        ...

    def shared(self, place: Place, x: str) -> str:
        """Append the attention of a layer that reads the cache of another; return the name of the attended value."""
        ...


def target_places(spec: TargetSpec) -> tuple[Place, ...]:
    """Return the layers of a target, in their order."""
    return tuple(_place(spec, number, layer.cache, "") for number, layer in enumerate(spec.layers))


def drafter_places(spec: DrafterSpec, target: TargetSpec) -> tuple[Place, ...]:
    """Return the layers of a drafter over the caches of `target`, in their order."""
    caches = {kind: target.shared_cache_index(kind) for kind in spec.kinds}
    return tuple(_place(spec, number, caches[layer.kind], "model.") for number, layer in enumerate(spec.layers))


def _place(spec: DecoderSpec, number: int, cache: int | None, path: str) -> Place:
    """Return a layer's place.

    Raises:
        ValueError: no graph has such a layer. The readers of config files refuse it before.
    """
    layer = spec.layers[number]
    if cache is None or layer.experts is not None or layer.keys_are_values:
        raise ValueError(f"no graph has a layer such as {layer}")
    return Place(spec=spec, layer=layer, number=number, cache=cache, prefix=f"{path}layers.{number}.")


def walk(builder: GraphBuilder, places: Sequence[Place], x: str, attention: Attention) -> str:
    """Append layers; return the name of the last one's output."""
    for place in places:
        attend = attention.own if place.layer.owns_cache else attention.shared
        x = _feed_forward(builder, place, {"x": x, "attended": attend(place, x)}, attention)
    return x


def _feed_forward(builder: GraphBuilder, place: Place, inputs: dict[str, str], attention: Attention) -> str:
    """Append the second half of a layer; return the name of its output."""
    spec, layer = place.spec, place.layer
    module = FeedForward if layer.per_layer is None else TargetFeedForward
    if layer.per_layer is not None:
        inputs = inputs | {"per_layer_input": f"per_layer_input_{place.number}{attention.value_suffix}"}
    key = f"feed_forward_{layer.intermediate_size}{attention.segment_suffix}"
    output = f"x_{place.number}"
    builder.call(key, lambda: module(spec, layer), inputs, {"x": output}, prefix=place.prefix)
    return output
