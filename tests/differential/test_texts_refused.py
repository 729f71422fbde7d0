"""Tokenizers that are refused, in words whose remedy helps; and any combination of what files say of special tokens."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mtp_export.errors import CheckpointError
from mtp_export.source import texts
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.embedded import EMBEDDED
from tests.differential.text_folders import (
    PROBE,
    SPEC,
    Change,
    TextSuite,
    compare,
    config,
    copied,
    drop_last,
    edit,
    edit_tokenizer,
    move_to_config,
    pad,
    token,
)
from tests.differential.transformation import Record

SUITE = TextSuite()
equal, refused = SUITE.equal, SUITE.refused


# What is refused, and the remedies


def as_tokenizers_backend(folder: Path) -> None:
    config(folder, tokenizer_class="TokenizersBackend")


def take_base(*names: str) -> Change:
    """The base model's files, which are nano's."""

    def remedy(folder: Path) -> None:
        for name in names:
            shutil.copy(EMBEDDED / "target" / name, folder / name)

    return remedy


@refused(
    "tokenizer.json: token '<think>' has the id 4096, and the model has rows for ids below vocab_size = 4096: "
    "take the base model's file, which fits these weights",
    take_base("tokenizer.json"),
)
def tokens_added_without_resizing(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)


@refused(
    "tokenizer_config.json, beside tokenizer.json: token '<end>' has the id 4096, and the model has rows for ids "
    "below vocab_size = 4096: name a token of the vocabulary there",
    lambda folder: config(folder, eos_token="<turn|>"),
)
def eos_of_another_family(folder: Path) -> None:
    config(folder, eos_token="<end>")


@refused(
    "added_tokens.json, beside tokenizer.json: token '<think>' has the id 4096",
    lambda f: (f / "added_tokens.json").unlink(),
)
def added_tokens_json_without_resizing(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<think>": 4096}', encoding="utf-8")


@refused("has a tokenizer.model and no tokenizer.json", take_base("tokenizer.json"))
def saved_with_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


@refused("tokenizer.json is a git-LFS pointer, not the file", take_base("tokenizer.json"))
def cloned_without_git_lfs(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 33384568\n"
    (folder / "tokenizer.json").write_text(pointer, encoding="utf-8")


@refused(
    "tokenizer_class is 'LlamaTokenizerFast', expected GemmaTokenizer or TokenizersBackend",
    as_tokenizers_backend,
)
def class_of_another_family(folder: Path) -> None:
    config(folder, tokenizer_class="LlamaTokenizerFast")


@refused(
    "GemmaTokenizer, which is BPE, and tokenizer.json has a WordLevel",
    as_tokenizers_backend,
)
def class_of_gemma_for_words(folder: Path) -> None:
    config(folder, tokenizer_class="GemmaTokenizer")
    model = {
        "type": "WordLevel",
        "vocab": {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "a": 4},
        "unk_token": "<unk>",
    }
    edit_tokenizer(folder, lambda document: document.update(model=model, added_tokens=[]))


@refused("tokenizer_config.json: eos_token is 1, expected a token as text", take_base("tokenizer_config.json"))
def token_as_a_number(folder: Path) -> None:
    config(folder, eos_token=1)


@refused("tokenizer_config.json: extra_special_tokens is [5]", take_base("tokenizer_config.json"))
def extra_tokens_as_numbers(folder: Path) -> None:
    config(folder, extra_special_tokens=[5])


@refused("added_tokens_decoder is no map from ids to tokens", take_base("tokenizer_config.json"))
def added_tokens_decoder_as_a_list(folder: Path) -> None:
    config(folder, added_tokens_decoder=[token("<think>")])


@refused("is not a token", take_base("tokenizer_config.json"))
def added_token_of_numbers(folder: Path) -> None:
    config(folder, added_tokens_decoder={"7": {"content": 7}})


@refused("added_tokens.json is not a map from tokens to ids", lambda folder: (folder / "added_tokens.json").unlink())
def added_tokens_json_the_wrong_way_round(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"4095": "<think>"}', encoding="utf-8")


@refused("tokenizer_config.json: chat_template is a list, expected a text", take_base("tokenizer_config.json"))
def template_list_without_names(folder: Path) -> None:
    move_to_config(folder, [PROBE])


@refused("tokenizer_config.json: chat_template is a dict, expected a text", take_base("tokenizer_config.json"))
def template_map_of_numbers(folder: Path) -> None:
    move_to_config(folder, {"default": 5})


@refused("tokenizer_config.json: eos_token is not Unicode", take_base("tokenizer_config.json"))
def half_a_surrogate(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"eos_token": "\\ud800"}', encoding="utf-8")


def take_the_versioned_one(folder: Path) -> None:
    (folder / "tokenizer.4.0.0.json").rename(folder / "tokenizer.json")
    config(folder, fast_tokenizer_files=...)


@refused(
    "tokenizer_config.json: fast_tokenizer_files names 'tokenizer.4.0.0.json', which transformers takes in place of",
    take_the_versioned_one,
)
def versioned_tokenizer(folder: Path) -> None:
    shutil.copy(folder / "tokenizer.json", folder / "tokenizer.4.0.0.json")
    edit_tokenizer(folder, lambda document: document.update(normalizer={"type": "Lowercase"}))
    config(folder, fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json", "tokenizer.9.0.json"])
    oracle = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert oracle.decode(oracle.encode("A", add_special_tokens=False)) == "A", "transformers takes the other"


@equal()
def tokenizers_of_later_versions(folder: Path) -> None:
    """Versions are compared as texts first: 4 is behind 10."""
    config(folder, fast_tokenizer_files=["tokenizer.json", "tokenizer.10.0.0.json", "tokenizer.4.0.0.json"])


DEEP = json.loads("[" * 600 + "]" * 600)
NO_LIST = "expected a list of tokens, or a map from names to tokens"
# What tokenizer_config.json and special_tokens_map.json say, and the refusal.
OF_OTHER_KINDS: Mapping[str, tuple[Any, Any, str]] = {
    **{
        f"{key} {value!r}": ({key: value}, None, f"tokenizer_config.json: {key} is {value!r}, {NO_LIST}")
        for key in ("extra_special_tokens", "additional_special_tokens")
        for value in (5, True, "<image>", 0.5)
    },
    **{
        f"map {value!r}": (
            {},
            {"extra_special_tokens": value},
            f"special_tokens_map.json: extra_special_tokens is {value!r}, {NO_LIST}",
        )
        for value in (5, True, "<image>")
    },
    **{
        f"specific {value!r}": (
            {"model_specific_special_tokens": value},
            None,
            f"tokenizer_config.json: model_specific_special_tokens is {value!r}, expected a map from names to tokens",
        )
        for value in (["a"], 5, True, "a")
    },
    "specific of a map": (
        {},
        {"model_specific_special_tokens": 5, "extra_special_tokens": {"image_token": "<unk>"}},
        "special_tokens_map.json: model_specific_special_tokens is 5, expected a map from names to tokens",
    ),
    "a token for a list": (
        {"additional_special_tokens": None, "extra_special_tokens": {"__type": "AddedToken", **token("<unk>")}},
        None,
        "tokenizer_config.json: model_specific_special_tokens is ",
    ),
    "deep": ({"anything": DEEP}, None, "tokenizer_config.json: anything holds lists or objects more than 100 deep"),
    "deep tokens": ({"extra_special_tokens": DEEP}, None, "extra_special_tokens holds lists or objects more than 100"),
    "deep map": ({}, {"eos_token": {"content": DEEP}}, "special_tokens_map.json: eos_token holds lists or objects"),
    "a long id": (
        {"added_tokens_decoder": {"1" * 5000: token("<unk>")}},
        None,
        "added_tokens_decoder is no map from ids to tokens: it has '111",
    ),
}


@pytest.mark.parametrize("name", OF_OTHER_KINDS)
def test_what_is_of_another_kind_is_one_line(tmp_path: Path, name: str) -> None:
    of_config, of_map, words = OF_OTHER_KINDS[name]
    folder = copied(tmp_path / "target")
    config(folder, **of_config)
    if of_map is not None:
        edit(folder / "special_tokens_map.json", **of_map)
    target = Checkpoint(folder, "target")
    with pytest.raises(CheckpointError) as refusal:
        texts.read_texts(target, SPEC)
    message = str(refusal.value)
    assert words in message
    assert len(message) < 600
    assert "\n" not in message
    with pytest.raises(CheckpointError, match=re.escape(message)):
        texts.special_tokens(target)


def test_nulls_are_nothing(tmp_path: Path) -> None:
    folder = copied(tmp_path / "target")
    config(folder, model_specific_special_tokens=None, extra_special_tokens=None)
    edit(folder / "special_tokens_map.json", extra_special_tokens={"image_token": "<unk>"})
    target = Checkpoint(folder, "target")
    assert texts.special_tokens(target)["image_token"] == "<unk>"
    texts.read_texts(target, SPEC)


@pytest.mark.parametrize("name", SUITE.cases)
def test_each(tmp_path: Path, name: str, record_property: Record) -> None:
    SUITE.run(name, tmp_path / "target", record_property)


TOKEN = st.sampled_from(
    [
        "<unk>",
        "<eos>",
        "<turn|>",
        "return",
        "<image>",
        None,
        *(
            {"__type": "AddedToken", **token(text, special=special)}
            for text in ("<pad>", "<image>")
            for special in (True, False)
        ),
    ]
)
NAMES = st.sampled_from(
    ["bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "image_token", "audio_token"]
)
NAMED = st.dictionaries(NAMES, TOKEN, max_size=4)
LISTED = st.lists(st.sampled_from(["<|turn>", "return", "<image>"]), max_size=2) | st.dictionaries(
    st.sampled_from(["image_token", "tool_token"]), st.sampled_from(["<unk>", "<image>"]), max_size=2
)
EXTRA = st.dictionaries(st.sampled_from(["extra_special_tokens", "additional_special_tokens"]), LISTED)
CLASS = st.sampled_from([{}, {"tokenizer_class": "GemmaTokenizer"}, {"tokenizer_class": "PreTrainedTokenizerFast"}])


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(CLASS, NAMED, EXTRA), st.none() | st.tuples(NAMED, EXTRA), st.booleans(), st.booleans())
def test_any_combination(
    tmp_path_factory: pytest.TempPathFactory, of_config: Any, of_map: Any, has_room: bool, has_padding: bool
) -> None:
    """What transformers loads has the same special tokens, ids and prompts, or is refused for an id without a row."""
    folder = copied(tmp_path_factory.mktemp("any") / "target")
    (folder / "tokenizer_config.json").unlink()
    if has_room:
        drop_last(folder)
    if has_padding:
        pad(folder, "<eos>")
    config(folder, **{key: value for part in of_config for key, value in part.items()})
    if of_map is not None:
        edit(folder / "special_tokens_map.json", **{key: value for part in of_map for key, value in part.items()})
    try:
        oracle = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (TypeError, ValueError):
        return  # what transformers does not load, anything may become of
    stated = [i for text, i in oracle.get_vocab().items() if i >= SPEC.vocab_size and text != "<mask>"]
    if stated:
        with pytest.raises(CheckpointError, match="has the id 4096"):
            texts.read_texts(Checkpoint(folder, "target"), SPEC)
    else:
        compare(folder)
