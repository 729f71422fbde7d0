"""Does a manifest agree with itself? Every signature's tensors follow from a handful of sizes (contract.py).

A backend then compares each signature with its graph, so that no number of a manifest is taken on trust but the
`attention_length` of format version 1, which only the converter knows.
"""

from __future__ import annotations

from collections.abc import Iterable

from mtp_runtime.bundle.context import standard_name
from mtp_runtime.bundle.contract import (
    BATCH_ROLES,
    MANIFEST_NAME,
    PARAM_COUNT,
    PARAM_TENSOR,
    CacheName,
    GraphSignature,
    Manifest,
    TensorSpec,
    batch_role,
)
from mtp_runtime.errors import BundleError

Tensors = dict[str, tuple[str, tuple[int | str, ...]]]

# How full a pool of caches is: slot of the last row of each sequence, and the largest number of rows.
_FILL: tuple[tuple[str, tuple[str, ...]], ...] = (("last", ("batch",)), ("total", ()))
# Kinds of signature that a graph must offer over the whole cache, whatever cheaper variants it has.
_WHOLE = {"target": ("decode", "verify"), "drafter": ("draft",)}
_KINDS = {
    "target": ("prefill", "decode", "verify"),
    "drafter": ("draft",),
    "embedder": ("embed",),
    "per_layer_embedder": ("embed",),
}


def check_consistency(manifest: Manifest) -> None:
    """Check every signature against the sizes that the manifest states.

    Raises:
        BundleError: a signature is missing, superfluous or of other tensors than its kind has.
    """
    if manifest.export_format == "onnx":
        _check_dynamic(manifest)
        return
    for role, kinds in _KINDS.items():
        specs = manifest.signatures[role]
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise _error(f"{role} has two signatures of one name")
        for spec in specs:
            if spec.kind not in kinds:
                raise _error(f"{role} has a signature {spec.name!r} of kind {spec.kind}, expected {' or '.join(kinds)}")
        for kind in _WHOLE.get(role, ()):
            if not any(spec.name == kind == spec.kind and _reads_all(spec, manifest) for spec in specs):
                raise _error(f"{role} has no {kind} signature over the whole cache of {manifest.cache_length}")
    _check_special_tokens(manifest)
    caches = _caches(manifest)
    per_layer = _per_layer_shape(manifest)
    for spec in manifest.signatures["target"]:
        _check_target(spec, manifest, caches, per_layer)
    for spec in manifest.signatures["drafter"]:
        _check_draft(spec, manifest, caches)
    for role, shape in (("embedder", (manifest.hidden_size,)), ("per_layer_embedder", per_layer)):
        for spec in manifest.signatures[role]:
            _compare(role, spec.name, "inputs", spec.inputs, {"token_ids": ("int32", (1, 1))})
            _compare(role, spec.name, "outputs", spec.outputs, {"embeddings": ("float32", (1, 1, *shape))})


def _check_special_tokens(manifest: Manifest) -> None:
    tokens = (manifest.bos_token_id, *manifest.stop_token_ids, *manifest.suppress_tokens)
    if any(not 0 <= token < manifest.vocab_size for token in tokens):
        raise _error(f"a special token is outside the vocabulary of {manifest.vocab_size}")


def _check_dynamic(manifest: Manifest) -> None:
    """Check the signatures of a bundle whose graphs take any number of tokens: one a graph."""
    _check_special_tokens(manifest)
    batch_roles = {batch_role(role) for role in BATCH_ROLES} if manifest.batch_size != 1 else set()
    if manifest.batch_size < 1 or not batch_roles <= manifest.files.keys():
        raise _error(f"batch_size is {manifest.batch_size} without the graphs for it")
    kinds = {"target": "forward", "drafter": "draft", "embedder": "embed", "per_layer_embedder": "embed"}
    for role, kind in kinds.items():
        if [spec.kind for spec in manifest.signatures[role]] != [kind]:
            raise _error(f"{role} has not one signature of kind {kind}")
    target, drafter, embedder, per_layer = (manifest.signatures[role][0] for role in kinds)
    caches: Tensors = {t.name: (t.dtype, t.shape) for t in target.inputs if t.is_cache}
    for name, (dtype, shape) in caches.items():
        pooled = len(shape) == 4 and shape[0] == "batch" and shape[2] in ("full_slots", "sliding_slots")
        fixed = pooled and all(isinstance(shape[i], int) and int(shape[i]) > 0 for i in (1, 3))
        if not fixed or dtype != "float32" or CacheName.parse(name).reader is not None:
            raise _error(f"{name} is {shape}, expected (batch, G, full_slots or sliding_slots, D)")
    if not caches:
        raise _error("the target has no KV caches")
    rows = per_layer.outputs[0].shape[2:] if per_layer.outputs else ()
    if len(rows) != 2:
        raise _error("per_layer_embedder has no output of shape (batch, tokens, L, P)")
    fill: Tensors = {f"{pool}_{name}": ("int32", shape) for pool in ("full", "sliding") for name, shape in _FILL}
    hidden, tokens = manifest.hidden_size, ("batch", "tokens")
    inputs: Tensors = {
        "embeddings": ("float32", (*tokens, hidden)),
        "per_layer_embeddings": ("float32", (*tokens, *rows)),
        "positions": ("int32", tokens),
        "logit_rows": ("int32", ("rows",)),
    }
    outputs: Tensors = {
        "logits": ("float32", ("batch", "rows", manifest.vocab_size)),
        "activations": ("float32", ("batch", "rows", hidden)),
    }
    _compare("target", target.name, "inputs", target.inputs, inputs | fill | caches)
    _compare("target", target.name, "outputs", target.outputs, outputs | caches | _as_read(target, caches))
    candidates = next((t.shape[-1] for t in drafter.outputs if t.name == "candidates" and t.shape), 0)
    inputs = {"activations": ("float32", ("batch", 1, 2 * hidden)), "positions": ("int32", ("batch", 1))}
    outputs = {
        "candidates": ("int32", ("batch", candidates)),
        "scores": ("float32", ("batch", candidates)),
        "best": ("int32", ("batch", 1)),
        "projected_activations": ("float32", ("batch", 1, hidden)),
    }
    shared = {t.name: caches[t.name] for t in drafter.inputs if t.is_cache and t.name in caches}
    outputs |= _as_read(drafter, shared)
    _compare("drafter", drafter.name, "inputs", drafter.inputs, inputs | fill | shared)
    _compare("drafter", drafter.name, "outputs", drafter.outputs, outputs)
    for role, spec, shape in (("embedder", embedder, (hidden,)), ("per_layer_embedder", per_layer, rows)):
        _compare(role, spec.name, "inputs", spec.inputs, {"token_ids": ("int32", tokens)})
        _compare(role, spec.name, "outputs", spec.outputs, {"embeddings": ("float32", (*tokens, *shape))})


def _as_read(spec: GraphSignature, caches: Tensors) -> Tensors:
    """The outputs by which layers that only read a cache give it back: `kv_cache_k_4.9` for layer 9."""
    names = [CacheName.parse(t.name) for t in spec.outputs if t.is_cache]
    read = {str(name): str(name.shared) for name in names if name.reader is not None}
    return {name: caches[cache] for name, cache in read.items() if cache in caches}


def _reads_all(spec: GraphSignature, manifest: Manifest) -> bool:
    return manifest.format_version > 1 or spec.attention_length == manifest.cache_length


def _caches(manifest: Manifest) -> Tensors:
    """Return the caches of the target's `decode`."""
    decode = manifest.signature("target", "decode")
    tensors = [tensor for tensor in decode.inputs if tensor.is_cache]
    names = [CacheName.parse(tensor.name) for tensor in tensors]
    if not tensors:
        raise _error("the target's decode has no KV caches")
    caches: Tensors = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    for tensor, name in zip(tensors, names, strict=True):
        expected = _cache_shapes(manifest, caches, name)
        if tensor.dtype != "float32" or name.reader is not None or not any(_fits(tensor, e) for e in expected):
            shapes = " or ".join(f"({', '.join(map(str, shape))})" for shape in expected)
            raise _error(f"{tensor.name} is {tensor.shape}, expected {shapes}")
    if manifest.ring_length:
        positions = CacheName(part="k", index=max(name.index for name in names))
        if caches.get(str(positions)) != ("float32", (1, 1, manifest.ring_length, 1)):
            raise _error(f"{positions} is not the positions of a ring of {manifest.ring_length}")
    return caches


def _cache_shapes(manifest: Manifest, caches: Tensors, name: CacheName) -> list[tuple[int | str, ...]]:
    """Return the shapes that a cache may have, G and D in them any numbers."""
    length, ring = manifest.cache_length, manifest.ring_length
    if name.part == "k":
        return [(1, "G", n, "D") for n in (length, ring) if n]
    keys = caches.get(str(CacheName(part="k", index=name.index)), ("", ()))[1]
    groups, slots, size = keys[1:] if len(keys) == 4 else ("G", length, "D")
    straight, swapped = (1, groups, slots, size), (1, groups, size, slots)
    if manifest.signature("target", "decode").single_buffer:
        return [swapped]
    return [straight] if manifest.format_version == 1 or slots == ring else [straight, swapped]


def _fits(tensor: TensorSpec, expected: tuple[int | str, ...]) -> bool:
    sizes = zip(tensor.shape, expected, strict=False)
    return len(tensor.shape) == len(expected) and all(isinstance(e, str) or size == e for size, e in sizes)


def _params(manifest: Manifest) -> Tensors:
    """What every signature of target and drafter takes where one of them does."""
    takes_params = manifest.signature("target", "decode").single_buffer
    return {PARAM_TENSOR: ("int32", (1, 1, 1, PARAM_COUNT))} if takes_params else {}


def _per_layer_shape(manifest: Manifest) -> tuple[int, ...]:
    outputs = [tensor for spec in manifest.signatures["per_layer_embedder"] for tensor in spec.outputs]
    if not outputs or len(outputs[0].shape) != 4:
        raise _error("per_layer_embedder has no output of shape (1, 1, L, P)")
    return outputs[0].fixed_shape[2:]


def _check_target(spec: GraphSignature, manifest: Manifest, caches: Tensors, per_layer: tuple[int, ...]) -> None:
    tokens = {"decode": 1, "verify": manifest.num_draft_tokens + 1}.get(spec.kind, spec.num_tokens)
    _check_sizes("target", spec, tokens, manifest)
    inputs: Tensors = {
        "embeddings": ("float32", (1, tokens, manifest.hidden_size)),
        "per_layer_embeddings": ("float32", (1, tokens, *per_layer)),
        "input_pos": ("int32", (tokens,)),
        "mask": ("float32", (1, 1, tokens, manifest.cache_length)),
        **_params(manifest),
    }
    outputs: Tensors = {
        "logits": ("float32", (1, tokens, manifest.vocab_size)),
        "activations": ("float32", (1, tokens, manifest.hidden_size)),
    }
    _compare("target", spec.name, "inputs", spec.inputs, inputs | caches)
    _compare("target", spec.name, "outputs", spec.outputs, caches if spec.kind == "prefill" else outputs | caches)


def _check_draft(spec: GraphSignature, manifest: Manifest, caches: Tensors) -> None:
    _check_sizes("drafter", spec, 1, manifest)
    own = {tensor.name for tensor in spec.inputs if tensor.is_cache}
    inputs: Tensors = {
        "activations": ("float32", (1, 1, 2 * manifest.hidden_size)),
        "input_pos": ("int32", (1,)),
        "mask": ("float32", (1, 1, 1, manifest.cache_length)),
        **_params(manifest),
    }
    outputs: Tensors = {
        "logits": ("float32", (1, 1, manifest.vocab_size)),
        "projected_activations": ("float32", (1, 1, manifest.hidden_size)),
    }
    shared = {name: tensor for name, tensor in caches.items() if name in own}
    _compare("drafter", spec.name, "inputs", spec.inputs, inputs | shared)
    _compare("drafter", spec.name, "outputs", spec.outputs, outputs)


def _check_sizes(role: str, spec: GraphSignature, tokens: int, manifest: Manifest) -> None:
    if spec.num_tokens != tokens or not 1 <= tokens <= manifest.cache_length:
        raise _error(f"{role} {spec.name} takes {spec.num_tokens} tokens, expected {tokens}")
    if manifest.format_version > 1:
        if spec.name != standard_name(spec) or spec.attention_length:
            raise _error(f"{role} {spec.name} is a variant, expected {standard_name(spec)}")
    elif not tokens <= spec.attention_length <= manifest.cache_length:
        raise _error(f"{role} {spec.name} reads {spec.attention_length} of {manifest.cache_length} cache positions")


def _compare(role: str, name: str, side: str, stated: Iterable[TensorSpec], expected: Tensors) -> None:
    tensors = list(stated)
    actual: Tensors = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    for key in sorted(actual.keys() | expected.keys()):
        if actual.get(key) != expected.get(key):
            raise _error(
                f"{role} {name}: among its {side}, {key} is {actual.get(key, 'absent')}, "
                f"expected {expected.get(key, 'absent')}"
            )
    if len(tensors) != len(actual):
        raise _error(f"{role} {name} has two {side} of one name")


def _error(text: str) -> BundleError:
    return BundleError(f"{MANIFEST_NAME}: {text}: export the bundle again")
