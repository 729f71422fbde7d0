"""The context of a bundle that is opened, and where the positions lie in its caches."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from mtp_runtime.bundle.contract import MANIFEST_NAME, CacheName, GraphSignature, Manifest, TensorSpec
from mtp_runtime.errors import BundleError, UserError

# Full layers read so many slots at a time: a multiple of the lanes in which kernels sum (docs/decisions/0011). Were the
# last of them fewer, a token's last bits would be others than in a longer cache.
FULL_STEP = 256


def opened_at(manifest: Manifest, context_length: int | None = None) -> Manifest:
    """Return the manifest of a bundle that is opened for so many tokens, by default for as many as it was exported for.

    It has the signatures that run there, one of a name and a kind: no prefill that is longer than the cache, and no
    variant of format version 1. Where the context is chosen, the cache has as many slots, rounded up to steps of
    full layers.

    Raises:
        UserError: the bundle cannot have such a context.
        BundleError: the manifest contradicts itself.
    """
    if manifest.export_format == "onnx":
        _check_only(manifest, context_length)
        return manifest
    if not manifest.chooses_context:
        _check_only(manifest, context_length)
        return _with_length(manifest, manifest.cache_length)
    length = manifest.context_length if context_length is None else context_length
    # A prompt of one token, and a round behind it.
    shortest, longest = manifest.num_draft_tokens + 2, manifest.longest_context_length
    if length > longest:
        raise UserError(
            f"the context is {length}, this bundle takes {shortest} to {longest}: give one of these, or export with "
            "a larger --cache-length if the model goes that far"
        )
    if length < shortest:
        raise UserError(f"the context is {length}, this bundle takes {shortest} to {longest}: give one of these")
    cache_length = -(-length // FULL_STEP) * FULL_STEP
    if cache_length >= manifest.cache_length:
        # LiteRT's buffers for what a graph gives have the size of the export: behind their end lies anything.
        raise BundleError(
            f"{MANIFEST_NAME}: cache_length is {manifest.cache_length}, too short for a context of {length}: export "
            "the bundle again"
        )
    opened = _with_length(manifest, cache_length)
    return msgspec.structs.replace(opened, cache_length=cache_length, context_length=length)


def standard_name(signature: GraphSignature) -> str:
    """Return the name that a signature of its kind has, if it reads all of the cache."""
    return f"prefill_{signature.num_tokens}" if signature.kind == "prefill" else signature.kind


def sliding_window(manifest: Manifest) -> int:
    """Return the sliding window of the target, in positions.

    Raises:
        BundleError: the manifest has none.
    """
    window = manifest.target.get("sliding_window")
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise BundleError(f"the manifest gives the target the sliding window {window!r}: export the bundle again")
    return window


class CachePlace(NamedTuple):
    """Which axis of a cache counts its slots, and whether they are a ring."""

    slot_axis: int
    is_ring: bool


def cache_places(manifest: Manifest) -> dict[str, CachePlace]:
    """Return the place of every cache of a manifest as it was exported: where the context has been chosen, a length may
    be any other size of a cache."""
    decode = manifest.signature("target", "decode")
    caches = {tensor.name: tensor for tensor in decode.inputs if tensor.is_cache}
    places = {}
    for name, tensor in caches.items():
        axis = _slot_axis(decode, caches, name)
        places[name] = CachePlace(axis, 0 < manifest.ring_length == tensor.shape[axis])
    return places


def _slot_axis(signature: GraphSignature, caches: dict[str, TensorSpec], name: str) -> int:
    """Return the axis of slots: keys are [1,G,S,D], and so are values, or they are [1,G,D,S]."""
    cache = CacheName.parse(name)
    keys = caches.get(str(CacheName(part="k", index=cache.index)))
    if cache.part == "k" or len(caches[name].shape) != 4:
        return 2
    if keys is None or keys.shape == caches[name].shape:
        is_square = caches[name].shape[2] == caches[name].shape[3]  # the shape says nothing
        return 3 if signature.single_buffer and is_square else 2
    return 3


def _check_only(manifest: Manifest, context_length: int | None) -> None:
    """Check that a context is the one that a bundle has."""
    if context_length not in (None, manifest.context_length):
        raise UserError(
            f"the context is {context_length}, this bundle has one of {manifest.context_length} alone: leave the "
            "choice out, or export with another --cache-length"
        )


def _with_length(manifest: Manifest, length: int) -> Manifest:
    """Return `manifest` with `length` in place of the cache length of its signatures, without those that do not run."""

    def resized(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(
            msgspec.structs.replace(
                tensor, shape=tuple(length if size == manifest.cache_length else size for size in tensor.shape)
            )
            for tensor in tensors
        )

    signatures = {}
    for role, specs in manifest.signatures.items():
        kept = [spec for spec in specs if spec.name == standard_name(spec) and spec.num_tokens <= length]
        signatures[role] = tuple(
            msgspec.structs.replace(spec, inputs=resized(spec.inputs), outputs=resized(spec.outputs)) for spec in kept
        )
    return msgspec.structs.replace(manifest, signatures=signatures)
