"""What a fine-tune looks like: the keys that a tool leaves in config.json, and a LoRA adapter in PEFT's layout.

The adapter is over attention and MLP of the text model and the vision tower, as Unsloth's FastVisionModel trains them:
names are those of modules in transformers, below `base_model.model.`; a clipped layer of the tower is adapted in its
`linear`. Layers that share keys and values have no such modules, so no pairs for them; the audio tower has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtp_export.arch.spec import PairSpec
from tools.synthesize.layout import TARGET_PREFIX, StoredTensor
from tools.synthesize.towers import VISION_PREFIX

UNSLOTH = "unsloth"
LEFTOVERS = (UNSLOTH,)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CLIPPED = ".linear"  # what a clipped layer of a tower calls the layer inside
# Of a side B, which is zero before training: so large, an adapter of rank 16 changes a row by 8 % of its length.
_SPREAD_OF_B = 0.02


def leftovers(pair: PairSpec) -> dict[str, Any]:
    """Return the outer keys that Unsloth adds to config.json; the token ids are those of the tokenizer."""
    return {
        "bos_token_id": pair.target.bos_token_id,
        "eos_token_id": pair.target.eos_token_ids[0],
        "model_name": _base_name(pair),
        "pad_token_id": pair.target.pad_token_id,
        "unsloth_fixed": True,
        "unsloth_version": "2026.9.2",
    }


def adapter_tensors(tensors: Sequence[StoredTensor], rank: int) -> list[StoredTensor]:
    """Return the pairs for the matrices among a target's tensors that are adapted."""
    pairs: list[StoredTensor] = []
    for tensor in tensors:
        module = tensor.name.removesuffix(".weight")
        projection = module.removesuffix(_CLIPPED).rpartition(".")[2]
        if projection not in _PROJECTIONS or not module.startswith((TARGET_PREFIX, VISION_PREFIX)):
            continue
        rows, columns = tensor.shape
        side = f"base_model.model.{module}.lora_{{}}.weight".format
        pairs += [
            StoredTensor(name=side("A"), shape=(rank, columns), spread=columns**-0.5, dtype="F32"),
            StoredTensor(name=side("B"), shape=(rows, rank), spread=_SPREAD_OF_B, dtype="F32"),
        ]
    return pairs


def adapter_config(pair: PairSpec, rank: int) -> dict[str, Any]:
    """adapter_config.json: PEFT's defaults but for what is trained."""
    projections = "|".join(_PROJECTIONS)
    language = rf"model\.language_model\..*\.({projections})"
    vision = rf"model\.vision_tower\..*\.({projections})\.linear"
    return {
        **_PLAIN_LORA,
        "auto_mapping": {
            "base_model_class": "Gemma4ForConditionalGeneration",
            "parent_library": "transformers.models.gemma4.modeling_gemma4",
            "unsloth_fixed": True,
        },
        "base_model_name_or_path": _base_name(pair),
        "lora_alpha": rank,
        "r": rank,
        "target_modules": f"({language})|({vision})",
    }


def _base_name(pair: PairSpec) -> str:
    return f"{UNSLOTH}/{pair.target_id.rpartition('/')[2]}"


_PLAIN_LORA: Mapping[str, Any] = {
    "alpha_pattern": {},
    "bias": "none",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "lora_dropout": 0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}
