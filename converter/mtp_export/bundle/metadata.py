"""What LiteRT-LM reads of a model besides its graphs: the LlmMetadata message, each field from the checkpoint.

The fields are those that Google's own bundles of Gemma 4 have (docs/litert-lm.md lists where each comes from).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from mtp_export.bundle.stock_template import habits_of, stock_template
from mtp_export.bundle.stock_template.compose import Habits
from mtp_runtime.bundle.contract import Manifest, SamplerDefaults

# Tokens of Gemma 4 by the names that its tokenizer gives them, which a fine-tune's tokenizer_config.json may lack.
_TOKENS = {
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "escape_token": '<|"|>',
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
_THOUGHT = "thought"


def llm_metadata(folder: Path, manifest: Manifest) -> Any:
    """Return the LlmMetadata message of a bundle whose texts lie in `folder`."""
    names = dict(manifest.special_tokens or {})
    pieces = _pieces(folder / manifest.files["tokenizer"].path)
    metadata = llm_metadata_pb2.LlmMetadata()
    # LiteRT-LM opens no file without a stop token; an id behind the vocabulary never comes.
    for token_id in manifest.stop_token_ids or (manifest.vocab_size,):
        metadata.stop_tokens.add().token_ids.ids.append(token_id)
    if manifest.suppress_tokens:
        metadata.suppress_tokens.ids.extend(manifest.suppress_tokens)
    _set_sampler(metadata.sampler_params, manifest.sampler or SamplerDefaults(), manifest.vocab_size)
    metadata.max_num_tokens = manifest.context_length
    tokens = {name: names.get(name, text) for name, text in _TOKENS.items()}
    _set_gemma4(metadata, {name: text for name, text in tokens.items() if text in pieces.values()})
    if manifest.images is not None:
        gemma4 = metadata.llm_model_type.gemma4
        gemma4.patch_width = gemma4.patch_height = manifest.images.patch_size
        gemma4.max_num_patches = manifest.images.max_num_patches
    starts_with_bos = True
    if "chat_template" in manifest.files:
        template = (folder / manifest.files["chat_template"].path).read_text(encoding="utf-8")
        stops = stop_texts(pieces, manifest.stop_token_ids)
        habits = habits_of(template, special_tokens=names, stops=stops)
        metadata.jinja_prompt_template = stock_template(template, habits, special_tokens=names, stops=stops)
        starts_with_bos = habits.starts_with_bos
        _set_affixes(metadata.prompt_templates, habits)
    if starts_with_bos:  # the runtime writes it before every prompt
        metadata.start_token.token_ids.ids.append(manifest.bos_token_id)
    return metadata


def metadata_differences(actual: Any, expected: Any) -> list[str]:
    """Return a line for each field of a container's metadata that is not as its bundle makes it."""
    theirs, ours = fields_of(actual), fields_of(expected)
    lines = []
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) == ours.get(name):
            continue
        if name == "jinja_prompt_template":
            lines.append(f"the .litertlm's {name} is not what the bundle's chat template becomes: export it again")
        else:
            lines.append(
                f"the .litertlm's {name} is {json.dumps(theirs.get(name))}, the bundle's files make it "
                f"{json.dumps(ours.get(name))}: export it again"
            )
    return lines


def fields_of(metadata: Any) -> dict[str, Any]:
    """Return the fields that a metadata message has, by name, as JSON."""
    fields: dict[str, Any] = json_format.MessageToDict(metadata, preserving_proto_field_name=True)
    return fields


def stop_texts(pieces: Mapping[int, str], stop_token_ids: Sequence[int]) -> list[str]:
    """Return the texts of the tokens that end a reply, as chat templates write them."""
    return [pieces[token_id] for token_id in stop_token_ids if token_id in pieces]


def added_pieces(tokenizer_json: str) -> dict[int, str]:
    """Return the texts of a tokenizer's added tokens, the special ones among them, by id."""
    return {token["id"]: token["content"] for token in json.loads(tokenizer_json).get("added_tokens") or []}


def _pieces(path: Path) -> dict[int, str]:
    return added_pieces(path.read_text(encoding="utf-8"))


def _set_sampler(parameters: Any, sampler: SamplerDefaults, vocab_size: int) -> None:
    """Write the checkpoint's sampler; there is no field for its repetition penalty. A checkpoint that does not sample
    keeps the likeliest token alone: on the CPU, LiteRT-LM refuses every type but TOP_P."""
    parameters.type = parameters.TOP_P
    parameters.k, parameters.p, parameters.temperature = 1, 1.0, 1.0
    if sampler.do_sample:
        parameters.k = min(sampler.top_k or vocab_size, vocab_size)
        parameters.p, parameters.temperature = sampler.top_p, sampler.temperature


# Fields of LiteRT-LM's Gemma 4 by the names that a tokenizer's config has their tokens by.
_TEXT_FIELDS = {
    "code_fence_start": "stc_token",
    "code_fence_end": "etc_token",
    "function_response_start": "str_token",
    "open_quote": "escape_token",
    "close_quote": "escape_token",
}
_MEDIA_FIELDS = {
    "start_of_image_token": "boi_token",
    "end_of_image_token": "eoi_token",
    "start_of_audio_token": "boa_token",
    "end_of_audio_token": "eoa_token",
}


def _set_gemma4(metadata: Any, tokens: Mapping[str, str]) -> None:
    """Write fences of calls, quotes, media tokens and the channel of thoughts, if the vocabulary has them."""
    gemma4 = metadata.llm_model_type.gemma4
    gemma4.SetInParent()
    for field, name in _TEXT_FIELDS.items():
        if name in tokens:
            setattr(gemma4, field, tokens[name])
    for field, name in _MEDIA_FIELDS.items():
        if name in tokens:
            getattr(gemma4, field).token_str = tokens[name]
    if {"soc_token", "eoc_token"} <= set(tokens):
        channel = metadata.channels.add()
        channel.channel_name, channel.is_reasoning_channel = _THOUGHT, True
        channel.start, channel.end = f"{tokens['soc_token']}{_THOUGHT}\n", tokens["eoc_token"]


def _set_affixes(templates: Any, habits: Habits) -> None:
    """Write the texts around a message of each role, for sessions that apply them without the template."""
    for role, affixes in (("user", habits.user_affixes), ("model", habits.model_affixes)):
        if affixes is not None:
            getattr(templates, role).prefix, getattr(templates, role).suffix = affixes
