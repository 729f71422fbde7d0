"""Every key of a config.json that counts as read is read: another value makes another model, or is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from mtp_export.arch import gemma4
from mtp_export.arch.config_keys import BOOKKEEPING, DRAFTER_DEFAULTS, ONE_VALUE, TEXT_DEFAULTS
from mtp_export.arch.spec import FULL, SLIDING
from mtp_export.errors import CheckpointError
from mtp_export.source.embedded import EMBEDDED

TARGET = json.loads((EMBEDDED / "target" / "config.json").read_text())
DRAFTER = json.loads((EMBEDDED / "drafter" / "config.json").read_text())
IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}
TURNED = {"rope_type": "default", "rope_theta": 5e5}
# Another value than nano's of each key, which the reader takes where it takes any other.
OTHER_VALUES: dict[str, Any] = {
    "attention_bias": True,
    "attention_k_eq_v": True,
    "bos_token_id": 7,
    "enable_moe_block": True,
    "eos_token_id": 7,
    "final_logit_softcapping": 20.0,
    "global_head_dim": 96,
    "head_dim": 96,
    "hidden_activation": "silu",
    "hidden_size": 320,
    "hidden_size_per_layer_input": 48,
    "intermediate_size": 384,
    "is_causal": False,
    "layer_types": [FULL, SLIDING] * 5,
    "max_position_embeddings": 8192,
    "model_type": "gemma3_text",
    "num_attention_heads": 8,
    "num_hidden_layers": 11,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 4,
    "pad_token_id": 7,
    "per_layer_config": {"0": {"head_dim": 96}},
    "rms_norm_eps": 1e-5,
    "rope_parameters": {SLIDING: TURNED, FULL: TURNED},
    "rope_scaling": {"factor": 8.0},
    "sliding_window": 64,
    "use_bidirectional_attention": "vision",
    "use_double_wide_mlp": False,
    "vocab_size": 2048,
    "vocab_size_per_layer_input": 2048,
}
# Keys that count as read and yet make no other model of nano, each with the reason.
WITHOUT_EFFECT = {
    "tie_word_embeddings": "a head of its own is refused where the tensors are read, by its values",
    "partial_rotary_factor": "counts where rope_parameters have none: see below",
    "rope_theta": "counts where rope_parameters have none: see below",
}
DRAFTER_VALUES: dict[str, Any] = {
    "backbone_hidden_size": 320,
    "centroid_intermediate_top_k": 8,
    "num_centroids": 64,
    "use_ordered_embeddings": False,
}


def changed(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Return a config whose text part has other values; ids of the whole config would go before those of the text."""
    config = copy.deepcopy(config)
    config["text_config"] |= values
    return {key: value for key, value in config.items() if key not in IDS & values.keys()}


def result(read: Any, config: dict[str, Any]) -> Any:
    """Return the spec, or None where the config is refused."""
    try:
        return read(config, "config.json")
    except CheckpointError:
        return None


def test_every_key_that_is_read_has_another_value_here() -> None:
    assert OTHER_VALUES.keys() | WITHOUT_EFFECT.keys() == TEXT_DEFAULTS.keys()
    assert DRAFTER_VALUES.keys() | {"tie_word_embeddings"} == DRAFTER_DEFAULTS.keys()
    assert ONE_VALUE.keys() <= OTHER_VALUES.keys()


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_a_key_of_the_text_makes_another_model_or_is_refused(key: str) -> None:
    before = gemma4.read_target_spec(changed(TARGET, **({key: 5} if key in IDS else {})), "config.json")
    after = result(gemma4.read_target_spec, changed(TARGET, **{key: OTHER_VALUES[key]}))
    assert after != before
    assert (after is None) >= (key in ONE_VALUE), "a key with one value is refused with any other"


@pytest.mark.parametrize("key", DRAFTER_VALUES)
def test_a_key_of_the_drafter_makes_another_model_or_is_refused(key: str) -> None:
    before = gemma4.read_drafter_spec(DRAFTER, "config.json")
    assert result(gemma4.read_drafter_spec, DRAFTER | {key: DRAFTER_VALUES[key]}) != before


@pytest.mark.parametrize(("key", "value"), [("rope_theta", 5e5), ("partial_rotary_factor", 0.5)])
def test_a_value_of_all_ropes_counts_where_a_rope_has_none(key: str, value: float) -> None:
    ropes = copy.deepcopy(TARGET["text_config"]["rope_parameters"])
    for rope in ropes.values():
        rope["rope_type"] = "proportional"
        rope.setdefault("rope_theta", 1e4)
        rope.pop(key, None)
    specs = [
        gemma4.read_target_spec(changed(TARGET, rope_parameters=ropes, **{key: each}), "config.json")
        for each in (value, value / 2)
    ]
    assert specs[0] != specs[1]


@pytest.mark.parametrize("key", sorted(BOOKKEEPING - TEXT_DEFAULTS.keys() - DRAFTER_DEFAULTS.keys() - {"text_config"}))
def test_bookkeeping_makes_no_other_model(key: str) -> None:
    config = changed(TARGET, **{key: "another"}) | {key: "another"}
    assert gemma4.read_target_spec(config, "config.json") == gemma4.read_target_spec(TARGET, "config.json")
