"""The values of E2B, E4B and nano, and the strict reading of their config.json."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from mtp_export.arch.spec import (
    FULL,
    SLIDING,
    ClusteredHeadSpec,
    DecoderSpec,
    DrafterSpec,
    LayerType,
    PairSpec,
    RopeSpec,
    TargetSpec,
)
from mtp_export.errors import CheckpointError

_SLIDING_ROPE = RopeSpec(theta=1e4, partial_rotary_factor=1.0)
_FULL_ROPE = RopeSpec(theta=1e6, partial_rotary_factor=0.25)
_DRAFTER_LAYERS: tuple[LayerType, ...] = (SLIDING, SLIDING, SLIDING, FULL)


def _pattern(num_layers: int, period: int) -> tuple[LayerType, ...]:
    """Every `period`-th layer has full attention."""
    return tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(num_layers))


_E2B_TARGET = TargetSpec(
    vocab_size=262144,
    hidden_size=1536,
    layer_types=_pattern(35, 5),
    intermediate_sizes=(6144,) * 15 + (12288,) * 20,
    num_heads=8,
    num_kv_heads=1,
    head_dim=256,
    global_head_dim=512,
    sliding_window=512,
    sliding_rope=_SLIDING_ROPE,
    full_rope=_FULL_ROPE,
    rms_norm_eps=1e-6,
    num_kv_shared_layers=20,
    per_layer_size=256,
    vocab_size_per_layer_input=262144,
    final_logit_softcapping=30.0,
    max_position_embeddings=131072,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_ids=(1, 106),
)
_E2B_DRAFTER = DrafterSpec(
    vocab_size=262144,
    hidden_size=256,
    layer_types=_DRAFTER_LAYERS,
    intermediate_sizes=(2048,) * 4,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    global_head_dim=512,
    sliding_window=512,
    sliding_rope=_SLIDING_ROPE,
    full_rope=_FULL_ROPE,
    rms_norm_eps=1e-6,
    backbone_hidden_size=1536,
    head=ClusteredHeadSpec(num_centroids=2048, top_k=32, vocab_size=262144),
)
E2B = PairSpec(
    name="e2b",
    target=_E2B_TARGET,
    drafter=_E2B_DRAFTER,
    target_id="google/gemma-4-E2B-it",
    drafter_id="google/gemma-4-E2B-it-assistant",
    cache_length=4096,
    num_draft_tokens=3,
    prefill_lengths=(128, 1024),
    prefix_lengths=(1024,),
)
E4B = PairSpec(
    name="e4b",
    target=dataclasses.replace(
        _E2B_TARGET,
        hidden_size=2560,
        layer_types=_pattern(42, 6),
        intermediate_sizes=(10240,) * 42,
        num_kv_heads=2,
        num_kv_shared_layers=18,
    ),
    drafter=dataclasses.replace(_E2B_DRAFTER, num_kv_heads=2, backbone_hidden_size=2560),
    target_id="google/gemma-4-E4B-it",
    drafter_id="google/gemma-4-E4B-it-assistant",
    cache_length=4096,
    num_draft_tokens=3,
    prefill_lengths=(128, 1024),
    prefix_lengths=(1024,),
)
NANO = PairSpec(
    name="nano",
    target=dataclasses.replace(
        _E2B_TARGET,
        vocab_size=4096,
        hidden_size=256,
        layer_types=_pattern(10, 5),
        intermediate_sizes=(512,) * 5 + (1024,) * 5,
        num_heads=4,
        head_dim=64,
        global_head_dim=128,
        sliding_window=128,
        num_kv_shared_layers=5,
        per_layer_size=32,
        vocab_size_per_layer_input=4096,
        max_position_embeddings=4096,
    ),
    drafter=dataclasses.replace(
        _E2B_DRAFTER,
        vocab_size=4096,
        hidden_size=128,
        intermediate_sizes=(256,) * 4,
        head_dim=64,
        global_head_dim=128,
        sliding_window=128,
        backbone_hidden_size=256,
        head=ClusteredHeadSpec(num_centroids=128, top_k=24, vocab_size=4096),
    ),
    target_id="",  # embedded in the package
    drafter_id="",
    cache_length=1024,
    num_draft_tokens=4,
    prefill_lengths=(16, 128),
    prefix_lengths=(256, 512, 1024, 2048),
)
PAIRS: Mapping[str, PairSpec] = {pair.name: pair for pair in (NANO, E2B, E4B)}

# Keys that say nothing about the computation.
_NEUTRAL = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "model_type",
        "pad_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
_STORED_AS = "quantization_config"  # says nothing of the architecture; the checkpoint reads it
# Keys of the whole multimodal config that concern parts which are not exported.
_OTHER_MODALITIES = frozenset(
    [
        "audio_config",
        "audio_token_id",
        "boa_token_id",
        "boa_token_index",
        "boi_token_id",
        "eoa_token_id",
        "eoa_token_index",
        "eoi_token_id",
        "image_token_id",
        "text_config",
        "video_token_id",
        "vision_config",
        "vision_soft_tokens_per_image",
    ]
)
# Keys with one value that we implement; any other is another architecture.
_TIED: Mapping[str, Any] = {"tie_word_embeddings": True}
_FIXED: Mapping[str, Any] = {
    "attention_bias": False,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": None,
    **_TIED,
}
# Sizes of experts mean nothing while enable_moe_block is false.
_UNUSED = frozenset(["expert_intermediate_size", "moe_intermediate_size", "num_experts", "top_k_experts"])
_READ = frozenset(
    [
        "final_logit_softcapping",
        "global_head_dim",
        "head_dim",
        "hidden_size",
        "hidden_size_per_layer_input",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "num_attention_heads",
        "num_global_key_value_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_kv_shared_layers",
        "per_layer_config",
        "rms_norm_eps",
        "rope_parameters",
        "sliding_window",
        "use_double_wide_mlp",
        "vocab_size",
        "vocab_size_per_layer_input",
    ]
)
_ASSISTANT = frozenset(
    ["backbone_hidden_size", "centroid_intermediate_top_k", "num_centroids", "text_config", "use_ordered_embeddings"]
)


_REPR = reprlib.Repr()  # of what a file says: enough to find it there, whatever it is
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxtuple = 64  # layer types of a spec, all of them


_MAX_NUMBER = 1e30


class _Config:
    """A config.json being read: each value checked for its type, with the place named in every error."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise CheckpointError(f"{where}: expected an object, got {type(values).__name__}")
        self.values, self.where = values, where

    def fail(self, key: str, got: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {_REPR.repr(got)}, expected {expected}")

    def without(self, key: str) -> _Config:
        return _Config({name: value for name, value in self.values.items() if name != key}, self.where)

    def get(self, key: str, kind: type) -> Any:
        if key not in self.values:
            raise CheckpointError(f"{self.where}: {key} is missing: this is not a Gemma 4 checkpoint, or a damaged one")
        value = self.values[key]
        if type(value) is not kind:
            raise self.fail(key, value, f"a value of type {kind.__name__}")
        return value

    def number(self, key: str) -> float:
        """A finite number, with a decimal point or without."""
        value = self.values[key] if type(self.values.get(key)) is int else self.get(key, float)
        if not abs(value) < _MAX_NUMBER:  # NaN, which JSON files may hold, is not less than anything
            raise self.fail(key, value, "a finite number")
        return float(value)

    def size(self, key: str) -> int:
        value: int = self.get(key, int)
        if not 0 < value < 2**31:
            raise self.fail(key, value, "a positive size")
        return value

    def child(self, key: str) -> _Config:
        return _Config(self.get(key, dict), f"{self.where}: {key}")

    def check_keys(self, known: frozenset[str]) -> None:
        unknown = sorted(set(self.values) - known)
        if unknown:
            raise CheckpointError(
                f"{self.where}: unknown key {_REPR.repr(unknown[0])} = {_REPR.repr(self.values[unknown[0]])}: "
                "this architecture is not Gemma 4 E2B/E4B as we know it"
            )

    def check_fixed(self, fixed: Mapping[str, Any]) -> None:
        for key, expected in fixed.items():
            value = self.values.get(key, expected)
            if type(value) is not type(expected) or value != expected:  # 0 is not false
                raise self.fail(key, value, repr(expected))

    def check_model_type(self, expected: Sequence[str]) -> None:
        if self.get("model_type", str) not in expected:
            raise self.fail("model_type", self.values["model_type"], " or ".join(map(repr, expected)))


def _layer_types(config: _Config) -> tuple[LayerType, ...]:
    values = config.get("layer_types", list)
    for value in values:
        if value not in (SLIDING, FULL):
            raise config.fail("layer_types", value, f"{SLIDING!r} or {FULL!r}")
    if len(values) != config.size("num_hidden_layers"):
        raise config.fail(
            "layer_types", f"{len(values)} entries", f"num_hidden_layers = {config.size('num_hidden_layers')}"
        )
    return tuple(values)


def _global_head_dim(config: _Config, layer_types: Sequence[LayerType]) -> int:
    """Published files say `global_head_dim`; files saved by transformers 5.22 override it layer by layer."""
    if "per_layer_config" not in config.values:
        return config.size("global_head_dim")
    overrides = config.child("per_layer_config")
    expected = [i for i, layer_type in enumerate(layer_types) if layer_type == FULL]
    # transformers pads the numbers of layers with zeros to one length.
    if sorted(int(layer) if layer.isdecimal() else -1 for layer in overrides.values) != expected:
        raise config.fail("per_layer_config", sorted(overrides.values), f"the full-attention layers {expected}")
    sizes = {overrides.child(layer).size("head_dim") for layer in overrides.values}
    for layer in overrides.values:
        overrides.child(layer).check_keys(frozenset({"head_dim"}))
    if len(sizes) != 1:
        raise config.fail("per_layer_config", sorted(sizes), "one head_dim for all full-attention layers")
    size = sizes.pop()
    config.check_fixed({"global_head_dim": size})  # a file that says it twice must mean the same
    return size


def _rope(config: _Config, layer_type: LayerType, rope_type: str) -> RopeSpec:
    rope = config.child("rope_parameters").child(layer_type)
    rope.check_keys(frozenset({"rope_type", "rope_theta", "partial_rotary_factor"}))
    rope.check_fixed({"rope_type": rope_type})
    factor = rope.number("partial_rotary_factor") if "partial_rotary_factor" in rope.values else 1.0
    return RopeSpec(theta=rope.number("rope_theta"), partial_rotary_factor=factor)


def _decoder_fields(config: _Config) -> dict[str, Any]:
    """What target and drafter read alike from a text_config."""
    config.check_model_type(("gemma4_text",))
    config.check_keys(_NEUTRAL | _UNUSED | _READ | frozenset(_FIXED))
    config.check_fixed(_FIXED)
    layer_types = _layer_types(config)
    return {
        "vocab_size": config.size("vocab_size"),
        "hidden_size": config.size("hidden_size"),
        "layer_types": layer_types,
        "num_heads": config.size("num_attention_heads"),
        "num_kv_heads": config.size("num_key_value_heads"),
        "head_dim": config.size("head_dim"),
        "global_head_dim": _global_head_dim(config, layer_types),
        "sliding_window": config.size("sliding_window"),
        "sliding_rope": _rope(config, SLIDING, "default"),
        "full_rope": _rope(config, FULL, "proportional"),
        "rms_norm_eps": config.number("rms_norm_eps"),
    }


def read_target_spec(values: Any, where: str) -> TargetSpec:
    """Read a target's config.json, the whole (`gemma4`) or the text part alone (`gemma4_text`).

    Raises:
        CheckpointError: a key is missing, unknown, or says what we do not implement.
    """
    outer = _Config(values, where).without(_STORED_AS)
    outer.check_model_type(("gemma4", "gemma4_text"))
    text = outer
    if outer.values["model_type"] == "gemma4":
        outer.check_keys(_NEUTRAL | _OTHER_MODALITIES | frozenset(_TIED))
        outer.check_fixed(_TIED)
        text = outer.child("text_config")
    fields = _decoder_fields(text)
    layers, width = len(fields["layer_types"]), text.size("intermediate_size")
    shared = text.get("num_kv_shared_layers", int)
    if not 0 < shared < layers or not {SLIDING, FULL} <= set(fields["layer_types"][: layers - shared]):
        raise text.fail("num_kv_shared_layers", shared, f"1 to {layers - 1}, with both layer types before them")
    wide = 2 * width if text.get("use_double_wide_mlp", bool) else width
    vocab = fields["vocab_size"]
    # A null is as good as an absent key: transformers writes either.
    eos, pad = (
        text.values.get(key) if outer.values.get(key) is None else outer.values[key]
        for key in ("eos_token_id", "pad_token_id")
    )
    return TargetSpec(
        **fields,
        intermediate_sizes=(width,) * (layers - shared) + (wide,) * shared,
        num_kv_shared_layers=shared,
        per_layer_size=text.size("hidden_size_per_layer_input"),
        vocab_size_per_layer_input=text.size("vocab_size_per_layer_input"),
        final_logit_softcapping=text.number("final_logit_softcapping"),
        max_position_embeddings=text.size("max_position_embeddings"),
        pad_token_id=0 if pad is None else token_ids(pad, vocab, f"{where}: pad_token_id")[0],
        bos_token_id=token_ids(text.get("bos_token_id", int), vocab, f"{where}: bos_token_id")[0],
        eos_token_ids=token_ids(eos, vocab, f"{where}: eos_token_id"),
    )


def read_drafter_spec(values: Any, where: str) -> DrafterSpec:
    """Read a drafter's config.json (`gemma4_assistant`).

    Raises:
        CheckpointError: as for a target.
    """
    outer = _Config(values, where)
    outer.check_model_type(("gemma4_assistant",))
    outer.check_keys(_NEUTRAL | _ASSISTANT | frozenset(_TIED))
    outer.check_fixed(_TIED)
    if outer.get("use_ordered_embeddings", bool) is not True:
        raise outer.fail(
            "use_ordered_embeddings", False, "true: give the drafter clusters first, with mtp-export cluster"
        )
    text = outer.child("text_config")
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        text.get(key, int)  # left out, it would mean another value than a drafter's
    text.check_fixed(
        {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "final_logit_softcapping": None,
            "use_double_wide_mlp": False,
        }
    )
    fields = _decoder_fields(text)
    layers = len(fields["layer_types"])
    text.check_fixed({"num_kv_shared_layers": layers})
    vocab, clusters = fields["vocab_size"], outer.size("num_centroids")
    if vocab % clusters:
        raise outer.fail("num_centroids", clusters, f"a divisor of vocab_size = {vocab}")
    top_k = outer.size("centroid_intermediate_top_k")
    if top_k > clusters:
        raise outer.fail("centroid_intermediate_top_k", top_k, f"at most num_centroids = {clusters}")
    return DrafterSpec(
        **fields,
        intermediate_sizes=(text.size("intermediate_size"),) * layers,
        backbone_hidden_size=outer.size("backbone_hidden_size"),
        head=ClusteredHeadSpec(num_centroids=clusters, top_k=top_k, vocab_size=vocab),
    )


def token_ids(value: Any, vocab_size: int, where: str) -> tuple[int, ...]:
    """One id or a list of ids, as config files write either.

    Raises:
        CheckpointError: it is neither, or an id is outside the vocabulary.
    """
    values = value if isinstance(value, list) else [value]
    if not values or any(type(v) is not int or not 0 <= v < vocab_size for v in values):
        raise CheckpointError(
            f"{where} is {_REPR.repr(value)}, expected a token id below vocab_size = {vocab_size}, or a list of them"
        )
    return tuple(values)


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
    for name in ("vocab_size", "num_kv_heads", "head_dim", "global_head_dim", "sliding_rope", "full_rope"):
        ours, theirs = getattr(drafter, name), getattr(target, name)
        if ours != theirs:
            raise CheckpointError(f"the drafter does not fit: its {name} is {ours}, the target's is {theirs}")
    if set(drafter.layer_types) != {SLIDING, FULL}:
        raise CheckpointError(
            f"the drafter does not fit: its layer_types are {sorted(set(drafter.layer_types))}, "
            f"expected {sorted({SLIDING, FULL})}"
        )


# A fine-tune may move these without becoming another model; and a drafter's vocabulary may be clustered anew.
_FREE_FIELDS = frozenset({"max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_ids", "head"})


def check_model(model: str, part: str, expected: DecoderSpec, got: DecoderSpec) -> None:
    """Check that a checkpoint's part (target or drafter) is the one of the model that the user named.

    Raises:
        CheckpointError: it is not; both values are named.
    """
    for field in dataclasses.fields(expected):
        want, have = getattr(expected, field.name), getattr(got, field.name)
        if field.name not in _FREE_FIELDS and want != have:
            raise CheckpointError(
                f"the {part}'s config.json has {field.name} = {_REPR.repr(have)}, but {model} has {_REPR.repr(want)}: "
                "give the --model that the checkpoint was made from"
            )
