"""What tools and other versions of transformers leave in config.json: none of it stops an export, and none of it makes
another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.differential.oracle import Pair
from tests.differential.test_config import ROPES
from tests.differential.transformation import Record, Suite
from tools.synthesize.media import BOOKKEEPING

SUITE = Suite()
equal, refused = SUITE.equal, SUITE.refused

BITSANDBYTES = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "llm_int8_skip_modules": ["lm_head"],
}
LIBRARY = dict(BOOKKEEPING)  # of transformers, which drafters' published text configs have
TOKENS = {
    "audio_token_id": 7,
    "boa_token_id": 8,
    "boi_token_id": 9,
    "eoa_token_id": 10,
    "eoa_token_index": 10,
    "eoi_token_id": 11,
    "image_token_id": 12,
    "video_token_id": 13,
}
# By name: changes of the outer config, changes of the text config, what is left aside.
OUTER: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "unsloth": (
        {"model_name": "unsloth/gemma-4-E2B-it", "unsloth_fixed": True, "unsloth_version": "2026.9.2"},
        ("`model_name`", "`unsloth_fixed`", "`unsloth_version`"),
    ),
    "token ids that the trainer aligned": ({"bos_token_id": 2, "eos_token_id": 106, "pad_token_id": 0}, ()),
    "token ids of other modalities": (TOKENS, ()),
    "bookkeeping of the library": (LIBRARY, ()),
    "a cache that is switched off": ({"use_cache": False}, ()),
    "the older name of the dtype": ({"dtype": ..., "torch_dtype": "float16"}, ()),
    "an attention implementation": ({"_attn_implementation_autoset": True, "attn_implementation": "sdpa"}, ()),
    "sizes copied up": ({"hidden_size": 256, "vocab_size": 4096}, ("`hidden_size`", "`vocab_size`")),
    "labels of a classifier": (
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "num_labels": 2},
        (),
    ),
    "a class of one's own that is never loaded": ({"auto_map": {"AutoModel": "modeling_own.Model"}}, ()),
    "nulls": ({"quantization_config": None, "tokenizer_class": None, "eos_token_id": None, "model_name": None}, ()),
    "an architecture of another class": ({"architectures": ["Gemma4Model"]}, ()),
    "a window of the text model beside it": ({"sliding_window": 5, "is_causal": None}, ("`sliding_window`",)),
    "another version": ({"transformers_version": "4.99.0"}, ()),
    "keys of other trainers": (
        {"axolotl": {"x": [1]}, "llamafactory_version": "1", "trl": True, "vllm": {"a": 1}, "zeta": 1},
        ("`axolotl`", "`llamafactory_version`", "`trl`", "2 more keys of config.json"),
    ),
}
TEXT: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "bookkeeping of the library in the text config": (LIBRARY, ()),
    "theta of older versions": ({"rope_theta": 500000.0}, ()),
    "partial rotation of older versions": ({"partial_rotary_factor": 0.5}, ()),
    "a pattern of windows that is null": ({"sliding_window_pattern": None}, ()),
    "a pattern of windows": ({"sliding_window_pattern": 5}, ("`text_config.sliding_window_pattern`",)),
    "an implementation of the cache": ({"cache_implementation": "hybrid"}, ("`text_config.cache_implementation`",)),
    "stop tokens as a list": ({"eos_token_id": [1, 106]}, ()),
    "the older name of the activation": (
        {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"},
        ("`text_config.hidden_act`",),
    ),
    "no beginning": ({"bos_token_id": None}, ()),
    "the original length of the full rotation": (
        {
            "rope_parameters": {
                **ROPES,
                "full_attention": ROPES["full_attention"] | {"original_max_position_embeddings": 9},
            }
        },
        ("`text_config.rope_parameters.full_attention.original_max_position_embeddings`",),
    ),
    "a partial rotation that windows do not use": (
        {
            "rope_parameters": {
                **ROPES,
                "sliding_attention": ROPES["sliding_attention"] | {"partial_rotary_factor": 0.5},
            }
        },
        (),
    ),
    "head sizes by layer": (
        {"global_head_dim": ..., "per_layer_config": {"4": {"head_dim": 128}, "9": {"head_dim": 128}}},
        (),
    ),
    "head sizes by layer, padded, beside another global one": (
        {"global_head_dim": 64, "per_layer_config": {"04": {"head_dim": 128}, "09": {"head_dim": 128}}},
        (),
    ),
    "sizes of experts": ({"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}, ()),
    "defaults left out": (
        dict.fromkeys(
            (
                "attention_bias",
                "attention_k_eq_v",
                "enable_moe_block",
                "hidden_activation",
                "model_type",
                "rms_norm_eps",
                "rope_parameters",
                "tie_word_embeddings",
                "use_bidirectional_attention",
            ),
            ...,
        ),
        (),
    ),
    "a longer context": ({"max_position_embeddings": 2048}, ()),
    "another dtype": ({"dtype": "float32"}, ()),
}
QUANTISED: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "in the whole config": ({"quantization_config": BITSANDBYTES}, {}),
    "in the text config": ({}, {"quantization_config": BITSANDBYTES}),
    "in both": ({"quantization_config": BITSANDBYTES}, {"quantization_config": BITSANDBYTES}),
    "of compressed-tensors": ({"quantization_config": {"quant_method": "compressed-tensors", "format": "?"}}, {}),
}


def register() -> None:
    for name, (changes, left_aside) in OUTER.items():
        equal(*left_aside)(_named(name, lambda pair, changes=changes: pair.config(changes)))
    for name, (changes, left_aside) in TEXT.items():
        equal(*left_aside)(_named(name, lambda pair, changes=changes: pair.text_config(**changes)))
    for name, (outer, text) in QUANTISED.items():

        def left_behind(pair: Pair, outer: Any = outer, text: Any = text) -> None:
            pair.config(outer)
            pair.text_config(**text)

        method = (outer or text)["quantization_config"]["quant_method"]
        # transformers would quantise what it loads: the dtype of the tensors decides here.
        equal(f"`quantization_config` ({method}): the weights are floats", loads=False)(
            _named(f"a quantization_config left behind {name}", left_behind)
        )


def _named(name: str, change: Any) -> Any:
    change.__name__ = name.replace(" ", "_")
    return change


register()


@equal(loads=False)
def nulls_of_which_transformers_fails(pair: Pair) -> None:
    """As it fails of a null for which its own classes have another value: there is no other meaning."""
    pair.text_config(pad_token_id=None, rope_scaling=None, attention_bias=None, vocab_size_per_layer_input=4096)
    pair.text_config("drafter", rope_scaling=None, use_double_wide_mlp=None)


@equal("of the drafter: `eagle`")
def keys_of_tools_in_a_drafter(pair: Pair) -> None:
    pair.config({**TOKENS, "eagle": True, "eos_token_id": [1, 106]}, "drafter")
    pair.text_config("drafter", **LIBRARY, final_logit_softcapping=30.0)


@equal()
def drafter_whose_sharing_is_left_out(pair: Pair) -> None:
    pair.text_config("drafter", num_kv_shared_layers=0)


@refused("attention_k_eq_v is True, expected False: no export of keys that are the values too, as the 12B and the 31B")
def keys_that_are_values(pair: Pair) -> None:
    pair.text_config(attention_k_eq_v=True)


@refused("enable_moe_block is True, expected False: no export of a mixture of experts, as the 26B has it")
def a_mixture_of_experts(pair: Pair) -> None:
    pair.text_config(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=64)


@refused(
    "model_type is 'gemma4_unified', expected 'gemma4' or 'gemma4_text': this is Gemma 4 12B, and E2B and E4B alone"
)
def another_size(pair: Pair) -> None:
    pair.config({"model_type": "gemma4_unified"})


@refused("the target's config.json has intermediate_size", remedy=None)
def a_size_that_is_none(pair: Pair) -> None:
    pair.text_config(intermediate_size=640)


@refused("full_attention: factor is 8.0, expected 1.0: no export of rescaled positions")
def positions_rescaled_for_a_longer_context(pair: Pair) -> None:
    pair.text_config(rope_parameters={**ROPES, "full_attention": ROPES["full_attention"] | {"factor": 8.0}})


@refused("is_causal is False, expected True: no export of attention to later tokens")
def an_embedding_model_made_of_it(pair: Pair) -> None:
    pair.text_config(is_causal=False)


@refused("config.json: is_causal is False, expected True: no export of attention to later tokens")
def an_embedding_model_made_of_it_by_a_flag_of_the_whole(pair: Pair) -> None:
    pair.config({"is_causal": False})


@refused("use_bidirectional_attention is 'all', expected None: no export of attention to later tokens")
def attention_in_both_directions(pair: Pair) -> None:
    pair.text_config(use_bidirectional_attention="all")


@refused("use_ordered_embeddings is False, expected true: give the drafter clusters first, with mtp-export cluster")
def a_drafter_with_a_dense_head(pair: Pair) -> None:
    pair.config({"use_ordered_embeddings": False}, "drafter")


@pytest.mark.parametrize("name", SUITE.cases)
def test_transformation(name: str, record_property: Record) -> None:
    SUITE.run(name, record_property)
