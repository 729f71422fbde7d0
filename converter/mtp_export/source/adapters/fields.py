"""The settings that PEFT has for LoRA: which are read, which change nothing, which must be plain, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtp_export.arch.json_object import shortened
from mtp_export.errors import CheckpointError

MERGE = "merge it with PEFT (merge_and_unload, save_pretrained) and give the result with --checkpoint"

# The fields of PEFT 0.21's LoraConfig; a test holds that there are no others. These are read:
READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "bias",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
)
# These change nothing in what is merged: bookkeeping, settings of training, or of other kinds of layers.
HARMLESS = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",  # PEFT sets it to what the layer is
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "monteclora_config",
)
# These must be plain, for the reason that is told; the remedy is given where there is one.
PLAIN: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "lora_bias": ((False, None), "the layers of the text model have no bias to merge into, in PEFT neither"),
    "megatron_config": ((None, {}), "it is for Megatron's layers: train or convert the adapter without it"),
    "alora_invocation_tokens": ((None, []), "it acts only after these tokens, which no merged weights do"),
    "use_qalora": ((False, None), "it was trained on a GPTQ checkpoint, and its matrices do not fit another"),
    "layer_replication": ((None, []), "it repeats layers of the model, and PEFT cannot merge it either"),
    "arrow_config": ((None,), "it chooses among adapters at each token, which no merged weights do"),
    "kasa_config": ((None,), "it changed the model's own weights too, and does not hold them"),
    "target_parameters": ((None, []), MERGE),
    "use_bdlora": ((None,), MERGE),
}
_BIASES = ("none", "all", "lora_only")
_VARIANTS = ("use_dora", "velora_config", "monteclora_config")  # ways to compute a layer, of which PEFT takes one
_HARMLESS_STARTS = ("eva", "orthogonal")
_HARMLESS_STARTS_OF_ANY_CASE = ("gaussian", "mica")
# Ways to start training that change the model's own weights: the adapter belongs to those, not to the checkpoint.
_CONVERTED_STARTS = ("pissa", "olora", "corda", "lora_ga")
CHANGED_STARTS = (*_CONVERTED_STARTS, "loftq")
_CONVERT = "save it with path_initial_model_for_weight_conversion, with which PEFT makes a plain LoRA of it"
# Kinds that PEFT cannot merge: they act on the prompt, on hidden states, or choose for each token.
UNMERGEABLE = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "LILY",
    "MULTITASK_PROMPT_TUNING",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "SHADOW",
    "XLORA",
)


def check_fields(where: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Check the settings that are not read further, and return the keys that PEFT does not know.

    Raises:
        CheckpointError: the adapter is of another kind than LoRA, or has a setting that cannot be merged.
    """
    _check_kind(where, values)
    for key, (plain, reason) in PLAIN.items():
        if values.get(key) not in plain:
            raise CheckpointError(f"{where}: {key} is {shortened(values[key])}: {reason}")
    _check_start(where, values.get("init_lora_weights", True))
    if values.get("bias") not in (*_BIASES, None):
        raise CheckpointError(f"{where}: bias is {shortened(values['bias'])}, expected one of {', '.join(_BIASES)}")
    variants = [key for key in _VARIANTS if values.get(key) not in (None, False)]
    if str(values.get("init_lora_weights")).lower() == "mica":
        variants.append("init_lora_weights")
    if len(variants) > 1:
        raise CheckpointError(f"{where} has {' and '.join(variants)}, of which PEFT takes one: leave one out")
    return tuple(sorted(shortened(key)[1:-1] for key in values.keys() - {*READ, *HARMLESS, *PLAIN}))


def _check_kind(where: str, values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind == "LORA":
        return
    if kind is None:
        raise CheckpointError(f"{where} has no peft_type: it is not PEFT's; save the adapter with PEFT")
    remedy = "no merged weights do what it does, so it cannot be exported" if kind in UNMERGEABLE else MERGE
    raise CheckpointError(f"{where}: peft_type is {shortened(kind)}, expected 'LORA': {remedy}")


def _check_start(where: str, start: object) -> None:
    if start is None or isinstance(start, bool):
        return
    name = str(start)
    if name in _HARMLESS_STARTS or name.lower() in _HARMLESS_STARTS_OF_ANY_CASE:
        return
    if name.lower().startswith(CHANGED_STARTS):
        remedy = _CONVERT if name.lower().startswith(_CONVERTED_STARTS) else "train it from another start"
        raise CheckpointError(
            f"{where}: init_lora_weights is {shortened(name)}, which changed the model's own weights too: {remedy}"
        )
    raise CheckpointError(
        f"{where}: init_lora_weights is {shortened(name)}, which is not known to leave the model's own weights alone: "
        "merge it where it was trained and give the result with --checkpoint"
    )
