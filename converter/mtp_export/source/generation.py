"""How a checkpoint says that tokens are chosen: generation_config.json, or what config.json has of it.

As transformers 5.22.2 reads them: without the file, config.json's own keys that are not null, then those of its
text_config; a key that is null or absent has the library's default, which is no stop token, and no sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from mtp_export.arch.json_object import shortened
from mtp_export.errors import CheckpointError
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.tokenizer_settings import read_object
from mtp_runtime.bundle.contract import SamplerDefaults

NAME = "generation_config.json"
_CONFIG = "config.json"
OBEYED = ("eos_token_id", "suppress_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
# Keys that can change what transformers generates, with the values that change nothing.
NOT_OBEYED: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": ([],),
    "constraints": (),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_length": (20,),
    "max_new_tokens": (),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_p": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (),
    "sequence_bias": (),
    "stop_strings": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
# The library's bookkeeping, and keys that change how fast it generates, how much it returns, or what is padded.
_IGNORED = frozenset(
    [
        "_commit_hash",
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "diversity_penalty",
        "early_stopping",
        "is_assistant",
        "length_penalty",
        "low_memory",
        "max_cache_len",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "return_dict_in_generate",
        "speculation_type",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
        "use_mtp",
    ]
)
_KNOWN = frozenset((*OBEYED, *NOT_OBEYED)) | _IGNORED
_TOP_K = 50  # where nothing is said
_MAX_TOP_K = 2**31 - 1  # no vocabulary is larger
_MAX_NUMBER = 1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Where generation stops, what never comes out, and how tokens are drawn unless a caller says otherwise;
    `left_aside` names what the files say beyond that."""

    stop_token_ids: tuple[int, ...]
    suppress_tokens: tuple[int, ...]
    sampler: SamplerDefaults
    left_aside: tuple[str, ...]


def read_generation(target: Checkpoint, vocab_size: int) -> GenerationDefaults:
    """Read the defaults of generation of a checkpoint.

    Raises:
        CheckpointError: a value is nothing that the library takes.
    """
    name = NAME if target.has(NAME) else _CONFIG
    keys = read_object(target, NAME) if name == NAME else _of_config(target.config)
    keys = {key: value for key, value in keys.items() if value is not None}
    where = str(target.folder / name)
    stops = _token_ids(keys.get("eos_token_id", []), f"{where}: eos_token_id")
    suppressed = _token_ids(keys.get("suppress_tokens", []), f"{where}: suppress_tokens")
    sampler = _sampler(keys, where)
    return GenerationDefaults(
        stop_token_ids=tuple(i for i in dict.fromkeys(stops) if 0 <= i < vocab_size),
        suppress_tokens=tuple(sorted({i for i in suppressed if 0 <= i < vocab_size})),
        sampler=sampler,
        left_aside=tuple(f"{name}: {phrase}" for phrase in _left_aside(keys, stops, sampler, vocab_size)),
    )


def _of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands for the file where there is none (`GenerationConfig.from_model_config`)."""
    keys = {key: value for key, value in config.items() if key in _KNOWN and value is not None}
    inner = next((config[name] for name in ("decoder", "generator", "text_config") if config.get(name)), None)
    if isinstance(inner, Mapping):
        keys = {key: value for key, value in inner.items() if key in _KNOWN} | keys
    return keys


def _token_ids(value: Any, where: str) -> list[int]:
    values: list[Any] = value if isinstance(value, list) else [value]
    if any(type(v) is not int for v in values):
        raise CheckpointError(f"{where} is {shortened(value)}, expected a token id or a list of them: correct it")
    return values


def _sampler(keys: Mapping[str, Any], where: str) -> SamplerDefaults:
    """What is only for drawing is the library's default where the checkpoint does not draw. A temperature of 0, which
    the library refuses when it generates, is no drawing."""
    samples = keys.get("do_sample", False)
    if type(samples) is not bool:
        raise CheckpointError(f"{where}: do_sample is {shortened(samples)}, expected true or false: correct it")
    penalty = _number(keys, "repetition_penalty", where, 1.0)
    if penalty <= 0:
        raise CheckpointError(f"{where}: repetition_penalty is {penalty}, expected more than 0: correct it")
    if not samples:
        return SamplerDefaults(repetition_penalty=penalty)
    temperature, top_p = _number(keys, "temperature", where, 1.0), _number(keys, "top_p", where, 1.0)
    top_k = keys.get("top_k", _TOP_K)
    if temperature < 0:
        raise CheckpointError(f"{where}: temperature is {temperature}, expected 0 or more: correct it")
    if type(top_k) is not int or top_k < 0:
        raise CheckpointError(
            f"{where}: top_k is {shortened(top_k)}, expected a positive integer, or 0 for all: correct it"
        )
    if not 0 <= top_p <= 1:
        raise CheckpointError(f"{where}: top_p is {top_p}, expected 0 to 1: correct it")
    if temperature == 0:
        return SamplerDefaults(repetition_penalty=penalty)
    if top_p == 0:  # the likeliest token stays
        top_k, top_p = 1, 1.0
    return SamplerDefaults(
        do_sample=True, temperature=temperature, top_k=min(top_k, _MAX_TOP_K), top_p=top_p, repetition_penalty=penalty
    )


def _number(keys: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = keys.get(key, default)
    # NaN, which JSON files may hold, is not less than anything.
    if type(value) not in (int, float) or not abs(value) < _MAX_NUMBER:
        raise CheckpointError(f"{where}: {key} is {shortened(value)}, expected a finite number: correct it")
    return float(value)


def _left_aside(keys: Mapping[str, Any], stops: list[int], sampler: SamplerDefaults, vocab_size: int) -> Iterator[str]:
    for key, value in sorted(keys.items()):
        if key in NOT_OBEYED and value not in NOT_OBEYED[key]:
            yield f"{key} = {shortened(value)}"
        elif key not in _KNOWN:
            yield key
    for token in stops:
        if not 0 <= token < vocab_size:
            yield f"eos_token_id {shortened(token)}, which is no token"
    if keys.get("do_sample") and not sampler.do_sample:
        yield "do_sample = True, where temperature = 0 leaves nothing to draw"
    if sampler.repetition_penalty != 1:
        yield f"repetition_penalty = {sampler.repetition_penalty:g} where the checkpoint's sampling is not asked for"
