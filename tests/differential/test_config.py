"""config.json means to us what it means to transformers, or is refused: any key, any value, any pair of changes.

What transformers understands is taken from where its model reads it: the config of each layer, the frequencies of its
rotary embedding, the flags of its masks.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Gemma4AssistantConfig, Gemma4Config, Gemma4TextConfig
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4_assistant import modeling_gemma4_assistant

from mtp_export.arch import gemma4
from mtp_export.arch.config_keys import BOOKKEEPING, DRAFTER_DEFAULTS, TEXT_DEFAULTS, unknown_keys
from mtp_export.arch.published import NANO, PAIRS
from mtp_export.arch.spec import FULL, SLIDING, DecoderSpec, DrafterSpec, TargetSpec
from mtp_export.errors import CheckpointError
from mtp_export.models.layers import inverse_frequencies
from mtp_export.source.embedded import EMBEDDED

PUBLISHED = Path(__file__).parents[3] / "shared" / "published"
Json = dict[str, Any]
Meaning = dict[str, Any]

TARGET: Json = json.loads((EMBEDDED / "target" / "config.json").read_text())
DRAFTER: Json = json.loads((EMBEDDED / "drafter" / "config.json").read_text())
# What transformers raises for what it does not take.
REFUSALS = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError)

# Keys that transformers' generic code knows, and that tools write, beside those that are read.
OTHER_KEYS = (
    "attention_chunk_size",
    "hidden_act",
    "layer_scale",
    "max_window_layers",
    "model_name",
    "no_rope_layers",
    "num_experts_per_tok",
    "num_global_key_value_heads",
    "original_max_position_embeddings",
    "query_pre_attn_scalar",
    "sliding_window_pattern",
    "tokenizer_class",
    "type_vocab_size",
)
ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
}


def ropes(**changes: Json) -> Json:
    return {kind: rope | changes.get(kind, {}) for kind, rope in ROPES.items()}


def without(rope: Json, key: str) -> Json:
    return {kind: {k: v for k, v in values.items() if k != key} for kind, values in rope.items()}


VALUES: tuple[Any, ...] = (None, True, False, 0, 1, 5, 64, 512, 0.5, 1e-6, "default", "all", "vision", [], {})
SPECIAL: dict[str, tuple[Any, ...]] = {
    "rope_parameters": (
        ropes(),
        ropes(sliding_attention={"partial_rotary_factor": 0.5}),
        ropes(sliding_attention={"partial_rotary_factor": 1.0, "factor": 8.0}),
        ropes(full_attention={"factor": 8.0}),
        ropes(full_attention={"factor": 1.0, "original_max_position_embeddings": 4096}),
        ropes(full_attention={"rope_type": "default"}),
        ropes(sliding_attention={"rope_type": "proportional"}),
        ropes(full_attention={"rope_type": "linear", "factor": 2.0}),
        ropes(full_attention={"rope_type": "yarn", "factor": 2.0}),
        without(ropes(), "partial_rotary_factor"),
        without(ropes(), "rope_type"),
        without(ropes(), "rope_theta"),
        {FULL: ROPES[FULL]},
        {FULL: ROPES[FULL], SLIDING: None},
        {"rope_type": "default", "rope_theta": 10000.0},
    ),
    "rope_scaling": ({"rope_type": "linear", "factor": 8.0}, {"type": "yarn", "factor": 2.0}),
    "per_layer_config": (
        {"4": {"head_dim": 128}, "9": {"head_dim": 128}},
        {"04": {"head_dim": 128}, "09": {"head_dim": 128}},
        {"4": {"head_dim": 128}},
        {"4": {"head_dim": 128, "num_key_value_heads": 1}, "9": {"head_dim": 128}},
        {"4": {"head_dim": 128, "num_key_value_heads": 2}, "9": {"head_dim": 128}},
        {"0": {"head_dim": 32}},
        {"77": {"head_dim": 32}},
    ),
    "layer_types": ([SLIDING] * 10, [FULL] * 10, ([FULL] + [SLIDING] * 4) * 2, TARGET["text_config"]["layer_types"]),
    "hidden_activation": ("gelu", "silu", "gelu_pytorch_tanh"),
    "rms_norm_eps": (1e-5, 1),
    "model_type": ("gemma3_text", "gemma4_text"),
}
CHANGES: list[tuple[str, Any]] = [
    (key, value)
    for key in sorted({*TEXT_DEFAULTS, *OTHER_KEYS})
    for value in (*VALUES, *SPECIAL.get(key, ()), ...)  # ... leaves the key out
]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """transformers warns of every odd value."""
    before = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    logging.getLogger("transformers").setLevel(before)


def changed(config: Json, *changes: tuple[str, Any], within: str = "text_config") -> Json:
    config = copy.deepcopy(config)
    place = config[within] if within else config
    for key, value in changes:
        place.pop(key, None)
        if value is not ...:
            place[key] = copy.deepcopy(value)
    return config


def meaning(text: Any) -> Meaning:
    """What transformers' model reads of a config, where it reads it. Raises what transformers raises.

    The flags are None where text is not computed as ours: then we must refuse.
    """
    layers = range(text.num_hidden_layers)
    rotary = modeling_gemma4.Gemma4TextRotaryEmbedding(text)
    own = text.num_hidden_layers - text.num_kv_shared_layers
    per_layer = [text.per_layer_config[i] for i in layers]
    plain = (
        getattr(text, "is_causal", True) is True
        and text.use_bidirectional_attention is None
        and not (text.attention_bias or text.attention_k_eq_v or text.enable_moe_block)
        and text.hidden_activation == "gelu_pytorch_tanh"
    )
    kinds = sorted(set(text.layer_types))
    return {
        "plain": plain,
        "vocab": text.vocab_size,
        "hidden": text.hidden_size,
        "layer_types": tuple(text.layer_types),
        "intermediate": [text.intermediate_size * (1 + (text.use_double_wide_mlp and i >= own > 0)) for i in layers],
        "heads": text.num_attention_heads,
        "kv_heads": [layer.num_key_value_heads for layer in per_layer],
        "head_dims": [layer.head_dim for layer in per_layer],
        "windows": {text.sliding_window for kind in text.layer_types if kind == SLIDING},
        "frequencies": {kind: getattr(rotary, f"{kind}_inv_freq").tolist() for kind in kinds},
        "scaling": {kind: getattr(rotary, f"{kind}_attention_scaling") for kind in kinds},
        "eps": text.rms_norm_eps,
        "shared": text.num_kv_shared_layers,
        "per_layer": text.hidden_size_per_layer_input,
    }


def of_spec(spec: DecoderSpec) -> Meaning:
    frequencies = {kind: inverse_frequencies(layer.rope, layer.head_dim) for kind, layer in spec.kinds.items()}
    windows = {layer.window for layer in spec.layers if layer.kind == SLIDING}
    assert all(layer.window is None for layer in spec.layers if layer.kind == FULL)
    return {
        "plain": True,
        "vocab": spec.vocab_size,
        "hidden": spec.hidden_size,
        "layer_types": spec.layer_types,
        "intermediate": [layer.intermediate_size for layer in spec.layers],
        "heads": spec.num_heads,
        "kv_heads": [layer.num_kv_heads for layer in spec.layers],
        "head_dims": [layer.head_dim for layer in spec.layers],
        "windows": windows,
        "frequencies": {
            kind: torch.tensor(values, dtype=torch.float32).tolist() for kind, values in frequencies.items()
        },
        "scaling": dict.fromkeys(spec.kinds, 1.0),
        "eps": spec.rms_norm_eps,
        "shared": spec.num_layers - spec.num_caches if isinstance(spec, TargetSpec) else spec.num_layers,
        "per_layer": spec.per_layer_size if isinstance(spec, TargetSpec) else 0,
    }


def same_text(spec: TargetSpec | DrafterSpec, library: Callable[..., Any], values: Json) -> Any:
    """Hold a spec against the text config that transformers reads.

    Return transformers' config; None where it does not load the values, and says nothing of what they mean.
    """
    try:
        theirs = library(**copy.deepcopy(values))
        expected = meaning(theirs.text_config)
    except REFUSALS:
        return None
    assert of_spec(spec) == expected
    return theirs


def same_target(values: Json) -> TargetSpec | None:
    """Read a target; what is read must be what transformers reads. None where we refuse."""
    try:
        spec = gemma4.read_target_spec(values, "config.json")
    except CheckpointError:
        return None
    theirs = same_text(spec, Gemma4Config, values)
    if theirs is not None:
        assert spec.final_logit_softcapping == theirs.text_config.final_logit_softcapping
        assert spec.vocab_size_per_layer_input == theirs.text_config.vocab_size_per_layer_input
    return spec


def same_drafter(values: Json) -> DrafterSpec | None:
    """Read a drafter, as `same_target` reads a target."""
    with contextlib.suppress(CheckpointError):
        spec = gemma4.read_drafter_spec(values, "config.json")
        theirs = same_text(spec, Gemma4AssistantConfig, values)
        if theirs is not None:
            assert theirs.use_ordered_embeddings
            assert (spec.backbone_hidden_size, spec.head.num_centroids, spec.head.top_k) == (
                theirs.backbone_hidden_size,
                theirs.num_centroids,
                theirs.centroid_intermediate_top_k,
            )
        return spec
    return None


def test_every_value_of_every_key_of_a_target() -> None:
    """Read as transformers reads it, or refused; and what transformers ignores, we do not refuse."""
    read = 0
    for key, value in CHANGES:
        values = changed(TARGET, (key, value))
        spec = same_target(values)
        read += spec is not None
        ignored = key in OTHER_KEYS
        if ignored:
            assert spec == NANO.target, f"{key} = {value!r} changes nothing"
    assert read > len(CHANGES) / 3


def test_every_value_of_every_key_of_a_drafter() -> None:
    read = sum(same_drafter(changed(DRAFTER, change)) is not None for change in CHANGES)
    outer = [(key, value) for key in DRAFTER_DEFAULTS for value in (*VALUES, ...)]
    read += sum(same_drafter(changed(DRAFTER, change, within="")) is not None for change in outer)
    assert read > len(CHANGES) / 3


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(CHANGES), min_size=2, max_size=4),
    st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), st.sampled_from(VALUES), max_size=3),
)
def test_any_changes_together(changes: list[tuple[str, Any]], unknown: Json) -> None:
    same_target(changed(TARGET, *changes))
    same_drafter(changed(DRAFTER, *changes))
    # Keys that nobody knows change nothing, and are reported unless they are null.
    unknown = {f"x-{key}": value for key, value in unknown.items()}
    for within, prefix in (("text_config", "text_config."), ("", "")):
        values = changed(TARGET, *unknown.items(), within=within)
        assert gemma4.read_target_spec(values, "config.json") == NANO.target
        assert unknown_keys(values) == tuple(sorted(prefix + k for k, v in unknown.items() if v is not None))


@pytest.mark.parametrize("name", ["hidden_size", "sliding_window", "use_bidirectional_attention", "layer_types"])
def test_a_key_of_the_text_model_outside_of_its_config_is_unknown(name: str) -> None:
    values = changed(TARGET, (name, 5), within="")
    assert gemma4.read_target_spec(values, "config.json") == NANO.target
    assert unknown_keys(values) == (name,)


def test_the_defaults_are_those_of_transformers() -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(Gemma4TextConfig)}
    ours = {key: value for key, value in TEXT_DEFAULTS.items() if key in theirs}
    assert ours == {key: theirs[key] for key in ours}
    drafter = {field.name: field.default for field in dataclasses.fields(Gemma4AssistantConfig)}
    assert {key: drafter[key] for key in DRAFTER_DEFAULTS} == DRAFTER_DEFAULTS
    # Not fields of the class, but known to it: tests above hold what they mean.
    assert TEXT_DEFAULTS.keys() - theirs.keys() == {
        *("global_head_dim", "is_causal", "model_type", "partial_rotary_factor", "per_layer_config", "rope_scaling"),
        "rope_theta",
    }


def test_every_key_that_transformers_writes_is_known() -> None:
    for config in (Gemma4Config(text_config=TARGET["text_config"]), Gemma4AssistantConfig(**copy.deepcopy(DRAFTER))):
        assert unknown_keys(json.loads(config.to_json_string(use_diff=False))) == ()


def test_every_key_that_the_model_reads_is_known() -> None:
    """Of the text model and the drafter, by their source: a new version must not read a key that we do not."""
    modules = [member for member in vars(modeling_gemma4).values() if inspect.isclass(member)]
    text = [m for m in modules if m.__module__ == modeling_gemma4.__name__ and m.__name__.startswith("Gemma4Text")]
    sources = [inspect.getsource(c) for c in [*text, modeling_gemma4.Gemma4ForCausalLM]]
    sources += [inspect.getsource(modeling_gemma4_assistant)]
    assert len(sources) > 8
    read = set(re.findall(r"config\.([a-z_]+)|getattr\((?:self\.)?config, \"([a-z_]+)\"", "\n".join(sources)))
    names = {name for pair in read for name in pair if name} - {"get_text_config"}
    assert {"num_kv_shared_layers", "rope_parameters", "centroid_intermediate_top_k"} < names
    assert names <= BOOKKEEPING | TEXT_DEFAULTS.keys() | DRAFTER_DEFAULTS.keys()


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="shared/published does not lie beside the repository")
def test_every_published_config_is_the_published_model() -> None:
    """Whichever version of transformers wrote it."""
    paths = sorted([*PUBLISHED.glob("*/config.json"), *PUBLISHED.glob("configs/*.json")])
    for path in paths:
        name = path.parent.name if path.name == "config.json" else path.name
        pair, values = PAIRS[name[:3]], json.loads(path.read_text())
        expected = pair.drafter if "assistant" in name else pair.target
        read = same_drafter(values) if "assistant" in name else same_target(values)
        assert (read, unknown_keys(values)) == (expected, ()), path
    assert len(paths) == 28
