"""The metadata of a model for LiteRT-LM: each field from the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mtp_export.arch.gemma4 import read_image_settings
from mtp_export.bundle.metadata import fields_of, llm_metadata
from mtp_runtime.bundle.contract import ImageSettings, Manifest, SamplerDefaults, read_manifest
from mtp_runtime.bundle.litertlm import read_metadata
from tests.conftest import Export, run_cli


@pytest.fixture(scope="module")
def bundle(export_nano: Export) -> Path:
    return export_nano("int8")


def fields(bundle: Path, **changes: Any) -> dict[str, Any]:
    manifest: Manifest = msgspec.structs.replace(read_manifest(bundle), **changes)
    return fields_of(llm_metadata(bundle, manifest))


def test_nano_has_the_fields_of_gemma_4(bundle: Path) -> None:
    metadata = fields_of(read_metadata(bundle / "nano.litertlm"))
    assert metadata.pop("jinja_prompt_template")
    assert metadata == {
        "start_token": {"token_ids": {"ids": [2]}},
        "stop_tokens": [{"token_ids": {"ids": [i]}} for i in (1, 106, 50)],
        "prompt_templates": {
            "user": {"prefix": "<|turn>user\n", "suffix": "<turn|>\n"},
            "model": {"prefix": "<|turn>model\n", "suffix": "<turn|>\n"},
        },
        "sampler_params": {"type": "TOP_P", "k": 1, "p": 1.0, "temperature": 1.0},
        "max_num_tokens": 1024,
        "llm_model_type": {
            "gemma4": {
                "start_of_image_token": {"token_str": "<|image>"},
                "end_of_image_token": {"token_str": "<image|>"},
                "start_of_audio_token": {"token_str": "<|audio>"},
                "end_of_audio_token": {"token_str": "<audio|>"},
                "code_fence_start": "<|tool_call>",
                "code_fence_end": "<tool_call|>",
                "open_quote": '<|"|>',
                "close_quote": '<|"|>',
                "function_response_start": "<|tool_response>",
            }
        },
        "channels": [
            {
                "channel_name": "thought",
                "start": "<|channel>thought\n",
                "end": "<channel|>",
                "is_reasoning_channel": True,
            }
        ],
    }


def test_a_checkpoint_that_samples(bundle: Path) -> None:
    sampler = SamplerDefaults(do_sample=True, temperature=0.75, top_k=64, top_p=0.5)
    params = fields(bundle, sampler=sampler)["sampler_params"]
    assert params == {"type": "TOP_P", "k": 64, "p": 0.5, "temperature": 0.75}
    every = fields(bundle, sampler=msgspec.structs.replace(sampler, top_k=0))["sampler_params"]
    assert every["k"] == 4096


def test_suppressed_tokens_and_images(bundle: Path) -> None:
    metadata = fields(bundle, suppress_tokens=(7, 9), images=ImageSettings(patch_size=16, max_num_patches=2520))
    assert metadata["suppress_tokens"] == {"ids": [7, 9]}
    gemma4 = metadata["llm_model_type"]["gemma4"]
    assert (gemma4["patch_width"], gemma4["patch_height"], gemma4["max_num_patches"]) == (16, 16, 2520)


def test_tokens_go_by_the_names_of_the_checkpoint(bundle: Path) -> None:
    """And those that the vocabulary lacks are left out."""
    names = {**(read_manifest(bundle).special_tokens or {}), "stc_token": "<|tool>", "boi_token": "<no such token>"}
    gemma4 = fields(bundle, special_tokens=names)["llm_model_type"]["gemma4"]
    assert gemma4["code_fence_start"] == "<|tool>"
    assert "start_of_image_token" not in gemma4


def test_metadata_without_a_stop_token_names_an_impossible_one(bundle: Path) -> None:
    assert fields(bundle, stop_token_ids=())["stop_tokens"] == [{"token_ids": {"ids": [4096]}}]


def test_metadata_without_a_template_has_no_prompt_fields(bundle: Path) -> None:
    files = {role: entry for role, entry in read_manifest(bundle).files.items() if role != "chat_template"}
    metadata = fields(bundle, files=files)
    assert "jinja_prompt_template" not in metadata
    assert "prompt_templates" not in metadata
    assert metadata["start_token"] == {"token_ids": {"ids": [2]}}


def test_a_template_that_writes_no_start_token_gets_none(bundle: Path, tmp_path: Path) -> None:
    """The runtime would write it before every prompt, and transformers does not."""
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((bundle / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}", encoding="utf-8"
    )
    assert "start_token" not in fields_of(llm_metadata(tmp_path, read_manifest(bundle)))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {
                "vision_config": {"patch_size": 16, "pooling_kernel_size": 3},
                "vision_soft_tokens_per_image": 280,
            },
            ImageSettings(patch_size=16, max_num_patches=2520),
        ),
        ({"vision_config": None}, None),
        ({}, None),
        ({"vision_config": {"patch_size": 16}}, None),
        ({"vision_config": {"patch_size": "16", "pooling_kernel_size": 3}, "vision_soft_tokens_per_image": 280}, None),
        ({"vision_config": {"patch_size": -1, "pooling_kernel_size": 3}, "vision_soft_tokens_per_image": 280}, None),
    ],
)
def test_image_settings(config: dict[str, Any], expected: ImageSettings | None) -> None:
    assert read_image_settings(config) == expected


def test_inspect_prints_them(bundle: Path) -> None:
    printed = run_cli("inspect", str(bundle), check=False).stdout
    assert printed.startswith("metadata for LiteRT-LM:\n")
    assert 'sampler_params: {"type": "TOP_P", "k": 1, "p": 1.0, "temperature": 1.0}' in printed
    assert "characters, from chat_template.jinja, SHA-256 " in printed
    document = json.loads(run_cli("inspect", str(bundle / "nano.litertlm"), "--json", check=False).stdout)
    assert document["metadata"]["max_num_tokens"] == 1024
    assert document["chat_template"]["source"] == "chat_template.jinja"


def test_inspect_prints_the_contexts(bundle: Path) -> None:
    printed = run_cli("inspect", str(bundle), check=False).stdout
    assert "\ncontext 1024 tokens unless the app chooses another, at most 4096\n" in printed
    assert "an answer can be taken back by up to 768 tokens\n" in printed
    assert "with constrained decoding it would be wrong instead: export with --rings off" in printed
    document = json.loads(run_cli("inspect", str(bundle), "--json", check=False).stdout)
    assert document["context"] == {
        "default": 1024,
        "longest": 4096,
        "chosen_at_load": True,
        "ring_length": 1024,
        "rewindable_tokens": 768,
    }
