"""config.json → specs, with the meaning that transformers gives it.

Which keys mean what is in config_keys.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mtp_export.arch.config_keys import DEFAULT_ROPES, DRAFTER_DEFAULTS, ONE_VALUE, OTHER_MODELS, TEXT_DEFAULTS
from mtp_export.arch.json_object import JsonObject, shortened
from mtp_export.arch.published import PAIRS
from mtp_export.arch.spec import (
    FULL,
    SLIDING,
    ClusteredHeadSpec,
    DecoderSpec,
    DrafterSpec,
    LayerSpec,
    LayerType,
    RopeSpec,
    TargetSpec,
    with_caches,
)
from mtp_export.errors import CheckpointError
from mtp_runtime.bundle.contract import ImageSettings

_MAX_LAYERS = 1024
_MAX_IMAGE_SIZE = 4096


class _Config(JsonObject):
    """An object whose keys have defaults: one that is left out, or null, has transformers' value."""

    def __init__(self, values: Any, where: str, defaults: Mapping[str, Any]) -> None:
        super().__init__(values, where)
        self.defaults = defaults

    def value(self, key: str) -> Any:
        value = self.values.get(key)
        return self.defaults[key] if value is None else value

    def size(self, key: str) -> int:
        return self.as_size(key, self.value(key))

    def number(self, key: str) -> float:
        return self.as_number(key, self.value(key))

    def flag(self, key: str) -> bool:
        return bool(self.as_kind(key, self.value(key), bool))

    def check_one_value(self) -> None:
        for key, (expected, other) in ONE_VALUE.items():
            # transformers takes a null here for false; of the others it is as good as left out.
            value = self.values.get(key, expected) if key == "is_causal" else self.value(key)
            if type(value) is not type(expected) or value != expected:  # 0 is not false
                raise self.fail(key, value, f"{expected!r}: no export of {other}")


def read_target_spec(values: Any, where: str) -> TargetSpec:
    """Read a target's config.json, the whole (`gemma4`) or the text part alone (`gemma4_text`).

    Raises:
        CheckpointError: it is another model's, or a key says what we do not implement.
    """
    outer = _Config(values, where, TEXT_DEFAULTS)
    _check_model_type(outer, ("gemma4", "gemma4_text"))
    text = _text_of(outer)
    fields = _decoder_fields(text)
    vocab = fields["vocab_size"]

    def ids(key: str) -> tuple[int, ...]:
        """Return the whole config's, the text config's where it has none, or else the default."""
        value = text.value(key) if outer.values.get(key) is None else outer.values[key]
        return token_ids(value, vocab, f"{where}: {key}")

    def one_id(key: str) -> int:
        return next(iter(ids(key)), TEXT_DEFAULTS[key])

    return TargetSpec(
        **fields,
        layers=_target_layers(text),
        vocab_size_per_layer_input=text.size("vocab_size_per_layer_input"),
        final_logit_softcapping=text.number("final_logit_softcapping"),
        max_position_embeddings=text.size("max_position_embeddings"),
        pad_token_id=one_id("pad_token_id"),
        bos_token_id=one_id("bos_token_id"),
        eos_token_ids=ids("eos_token_id"),
    )


def _target_layers(text: _Config) -> tuple[LayerSpec, ...]:
    """Read the layers of a target: the last ones share the caches of others, and may be twice as wide."""
    layers, per_layer = _layers(text), text.size("hidden_size_per_layer_input")
    shared = text.as_kind("num_kv_shared_layers", text.value("num_kv_shared_layers"), int)
    own = len(layers) - shared
    if not 0 < shared < len(layers) or {layer.kind for layer in layers[:own]} != {SLIDING, FULL}:
        raise text.fail("num_kv_shared_layers", shared, f"1 to {len(layers) - 1}, with both layer types before them")
    times = 2 if text.flag("use_double_wide_mlp") else 1
    sized = [
        dataclasses.replace(
            layer, intermediate_size=layer.intermediate_size * (1 if i < own else times), per_layer=per_layer
        )
        for i, layer in enumerate(layers)
    ]
    return with_caches(sized, shared)


def read_drafter_spec(values: Any, where: str) -> DrafterSpec:
    """Read a drafter's config.json (`gemma4_assistant`).

    Raises:
        CheckpointError: as for a target.
    """
    outer = _Config(values, where, DRAFTER_DEFAULTS)
    _check_model_type(outer, ("gemma4_assistant",))
    if outer.flag("use_ordered_embeddings") is not True:
        raise outer.fail(
            "use_ordered_embeddings", False, "true: give the drafter clusters first, with mtp-export cluster"
        )
    text = _text_of(outer)
    fields = _decoder_fields(text)
    layers = _layers(text)
    needed = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "use_double_wide_mlp": False}
    shared = {"num_kv_shared_layers": len(layers)} if text.value("num_kv_shared_layers") else {}  # 0 means all, here
    for key, expected in (needed | shared).items():
        if text.value(key) != expected:
            raise text.fail(key, text.value(key), f"{expected!r}, which a drafter has")
    vocab, clusters = fields["vocab_size"], outer.size("num_centroids")
    if vocab % clusters:
        raise outer.fail("num_centroids", clusters, f"a divisor of vocab_size = {vocab}")
    top_k = outer.size("centroid_intermediate_top_k")
    if top_k > clusters:
        raise outer.fail("centroid_intermediate_top_k", top_k, f"at most num_centroids = {clusters}")
    return DrafterSpec(
        **fields,
        layers=tuple(layers),
        backbone_hidden_size=outer.size("backbone_hidden_size"),
        head=ClusteredHeadSpec(num_centroids=clusters, top_k=top_k, vocab_size=vocab),
    )


def _check_model_type(config: JsonObject, expected: Sequence[str]) -> None:
    if "model_type" not in config.values:
        raise CheckpointError(
            f"{config.where}: model_type is missing: this is not a Gemma 4 checkpoint, or a damaged one"
        )
    model_type = config.values["model_type"]
    if model_type in expected:
        return
    other = OTHER_MODELS.get(model_type) if isinstance(model_type, str) else None
    hint = f": this is {other}, and E2B and E4B alone are exported" if other else ""
    raise config.fail("model_type", model_type, " or ".join(map(repr, expected)) + hint)


def _text_of(outer: _Config) -> _Config:
    """Return the text config within a whole one, or the one that stands alone."""
    if outer.values["model_type"] == "gemma4_text":
        return outer
    if outer.values.get("is_causal") not in (None, True):  # a flag of any model in transformers, beside its parts too
        raise outer.fail("is_causal", outer.values["is_causal"], "True: no export of attention to later tokens")
    child = outer.child("text_config")
    text = _Config(child.values, child.where, TEXT_DEFAULTS)
    if text.value("model_type") != "gemma4_text":
        raise text.fail("model_type", text.value("model_type"), "'gemma4_text'")
    return text


def _decoder_fields(text: _Config) -> dict[str, Any]:
    """Read what target and drafter have alike in a text_config, but for their layers."""
    text.check_one_value()
    return {
        "vocab_size": text.size("vocab_size"),
        "hidden_size": text.size("hidden_size"),
        "num_heads": text.size("num_attention_heads"),
        "rms_norm_eps": text.number("rms_norm_eps"),
    }


def _layers(text: _Config) -> list[LayerSpec]:
    """Read the layers of a text_config, as a drafter has them: without inputs and caches of their own."""
    kinds = _layer_types(text)
    num_kv_heads, head_dims = text.size("num_key_value_heads"), _head_dims(text, kinds)
    window, width = text.size("sliding_window"), text.size("intermediate_size")
    ropes = {kind: _rope(text, kind) for kind in (SLIDING, FULL)}
    return [
        LayerSpec(
            kind=kind,
            intermediate_size=width,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            rope=ropes[kind],
            window=window if kind == SLIDING else None,
            cache=None,
            owns_cache=False,
            per_layer=None,
            experts=None,
            keys_are_values=False,
        )
        for kind, head_dim in zip(kinds, head_dims, strict=True)
    ]


def _layer_types(text: _Config) -> tuple[LayerType, ...]:
    """Read the stated ones, or every sixth with full attention; transformers makes the last one full in any case."""
    count = text.size("num_hidden_layers")
    if count > _MAX_LAYERS:
        raise text.fail("num_hidden_layers", count, f"at most {_MAX_LAYERS}")
    values = text.value("layer_types")
    if values is None:
        values = [SLIDING if (i + 1) % 6 else FULL for i in range(count)]
    for value in text.as_kind("layer_types", values, list):
        if value not in (SLIDING, FULL):
            raise text.fail("layer_types", value, f"{SLIDING!r} or {FULL!r}")
    if len(values) != count:
        raise text.fail("layer_types", f"{len(values)} entries", f"num_hidden_layers = {count}")
    return (*values[:-1], FULL)


def _head_dims(text: _Config, layer_types: Sequence[LayerType]) -> list[int]:
    """Read the head size of each layer. Published files say `global_head_dim`; transformers (5.18 and later) overrides
    head_dim layer by layer, and then that alone counts."""
    base = text.size("head_dim")
    if "per_layer_config" in text.values:
        overrides = _layer_overrides(text, len(layer_types))
    else:
        overrides = {i: text.size("global_head_dim") for i, kind in enumerate(layer_types) if kind == FULL}
    sizes = [overrides.get(layer, base) for layer in range(len(layer_types))]
    for layer_type in (SLIDING, FULL):
        of_type = {size for size, kind in zip(sizes, layer_types, strict=True) if kind == layer_type}
        if any(size % 2 for size in of_type):
            raise text.fail("head_dim", max(of_type), "an even size: rotary embeddings turn pairs")
        if len(of_type) > 1:
            raise text.fail("per_layer_config", sorted(of_type), f"one head_dim for all layers of {layer_type}")
    return sizes


def _layer_overrides(text: _Config, num_layers: int) -> dict[int, int]:
    """Read the head size of each layer that has one of its own; its other values must be the model's."""
    if text.values["per_layer_config"] is None:
        return {}
    layers = text.child("per_layer_config")
    sizes = {}
    for name in layers.values:
        layer = int(name) if name.isdecimal() and len(name) < 6 else -1  # transformers pads numbers with zeros
        if not 0 <= layer < num_layers:
            raise layers.fail("layer", name, f"0 to {num_layers - 1}")
        override = layers.child(name)
        for key, value in override.values.items():
            if key == "head_dim":
                sizes[layer] = override.as_size(key, value)
            elif key not in text.defaults or value != text.value(key):
                raise override.fail(key, value, "head_dim alone: other layers of a size of their own are not exported")
    return sizes


def _rope(text: _Config, layer_type: LayerType) -> RopeSpec:
    """Read the rotary embedding of a layer type, as transformers' rope functions of the two types compute it."""
    ropes = _Config(
        {**DEFAULT_ROPES} if text.value("rope_parameters") is None else text.values["rope_parameters"],
        f"{text.where}: rope_parameters",
        {},
    )
    rope = ropes.child(layer_type)
    rope_type = rope.values.get("rope_type", rope.values.get("type", "default"))
    if rope_type not in ("default", "proportional"):
        raise rope.fail("rope_type", rope_type, "'default' or 'proportional'")
    theta = rope.as_number("rope_theta", rope.values.get("rope_theta", text.value("rope_theta")))
    if rope_type == "default":  # all of the head is rotated, whatever else is stated
        return RopeSpec(theta=theta, partial_rotary_factor=1.0)
    factor = rope.as_number("factor", rope.values.get("factor", 1.0))
    if factor != 1.0:
        raise rope.fail("factor", factor, "1.0: no export of rescaled positions")
    partial = text.value("partial_rotary_factor")
    partial = rope.values.get("partial_rotary_factor", 1.0 if partial is None else partial)
    return RopeSpec(theta=theta, partial_rotary_factor=rope.as_number("partial_rotary_factor", partial))


def token_ids(value: Any, vocab_size: int, where: str) -> tuple[int, ...]:
    """Return the ids of a value that is one id or a list of them.

    Those that are no token's, as -1 for none, are left out.

    Raises:
        CheckpointError: it is neither.
    """
    values = value if isinstance(value, list) else [value]
    if any(type(v) is not int for v in values):
        raise CheckpointError(f"{where} is {shortened(value)}, expected a token id, or a list of them")
    return tuple(v for v in values if 0 <= v < vocab_size)


def read_image_settings(config: Mapping[str, Any]) -> ImageSettings | None:
    """Read how images are cut, None where there is no vision tower or it does not say."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return None
    values = [vision.get("patch_size"), vision.get("pooling_kernel_size"), config.get("vision_soft_tokens_per_image")]
    sizes = [value for value in values if type(value) is int and 0 < value < _MAX_IMAGE_SIZE]
    if len(sizes) < len(values):
        return None
    patch, pooled, tokens = sizes
    return ImageSettings(patch_size=patch, max_num_patches=tokens * pooled * pooled)


def check_pair(target: TargetSpec, drafter: DrafterSpec) -> None:
    """Check that a drafter fits its target.

    Raises:
        CheckpointError: it does not; both values are named.
    """
    if drafter.backbone_hidden_size != target.hidden_size:
        raise CheckpointError(
            f"the drafter does not fit: its backbone_hidden_size is {drafter.backbone_hidden_size}, "
            f"the target's hidden_size is {target.hidden_size}"
        )
    if drafter.kinds.keys() != {SLIDING, FULL}:
        raise CheckpointError(
            f"the drafter does not fit: its layer_types are {sorted(drafter.kinds)}, expected {sorted({SLIDING, FULL})}"
        )
    ours, theirs = drafter.values(), target.values()
    for name in ("vocab_size", "num_kv_heads", "head_dim", "global_head_dim", "sliding_rope", "full_rope"):
        if ours[name] != theirs[name]:
            raise CheckpointError(
                f"the drafter does not fit: its {name} is {ours[name]}, the target's is {theirs[name]}"
            )


# A fine-tune may move these without becoming another model; and a drafter's vocabulary may be clustered anew.
_FREE_FIELDS = frozenset({"max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_ids", "head"})


def check_model(model: str, part: str, expected: DecoderSpec, got: DecoderSpec) -> None:
    """Check that a checkpoint's part (target or drafter) is the one of the model that the user named.

    Raises:
        CheckpointError: it is not; both values are named.
    """
    differing = _differing(expected, got)
    if not differing:
        return
    for pair in PAIRS.values():
        if pair.name != model and not _differing(getattr(pair, part), got):
            raise CheckpointError(f"the {part} is {pair.name}, and --model is {model}: give --model {pair.name}")
    field = differing[0]
    if set(differing) <= {"vocab_size", "vocab_size_per_layer_input"}:
        raise CheckpointError(
            f"the {part}'s vocabulary has {got.vocab_size} tokens and that of {model} {expected.vocab_size}: one of "
            f"the pair was resized: call resize_token_embeddings({expected.vocab_size}) and save it again"
        )
    raise CheckpointError(
        f"the {part}'s config.json has {field} = {shortened(got.values()[field])}, "
        f"but {model} has {shortened(expected.values()[field])}: "
        f"this is none of {', '.join(PAIRS)}, and models of other sizes are not exported"
    )


def _differing(expected: DecoderSpec, got: DecoderSpec) -> list[str]:
    """Return the names of the values in which a spec is another model's."""
    values = got.values()
    return [name for name, value in expected.values().items() if name not in _FREE_FIELDS and values[name] != value]
