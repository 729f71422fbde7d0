"""Tokenizers and special tokens as tools leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mtp_export.source.embedded import EMBEDDED
from tests.differential.text_folders import ALPACA, TextSuite, config, drop_last, edit, pad, template, token
from tests.differential.transformation import Record

SUITE = TextSuite()
equal, refused = SUITE.equal, SUITE.refused


# Special tokens


@equal()
def published(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes((EMBEDDED / "target" / "chat_template.jinja").read_bytes())


@equal()
def unsloths_alpaca(folder: Path) -> None:
    template(folder, ALPACA)


@equal()
def no_tokenizer_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


@equal()
def tokens_that_are_null(folder: Path) -> None:
    config(folder, eos_token=None, pad_token=None)


@equal()
def no_padding_token(folder: Path) -> None:
    config(folder, pad_token=...)


@equal()
def eos_as_end_of_turn(folder: Path) -> None:
    config(folder, eos_token="<turn|>")


@equal()
def tokens_as_objects(folder: Path) -> None:
    config(
        folder,
        eos_token={"__type": "AddedToken", **token("<turn|>")},
        bos_token={"__type": "AddedToken", **token("<bos>")},
    )


@equal()
def image_token_of_a_processor(folder: Path) -> None:
    config(folder, image_token="<unk>", audio_token="<pad>")


@equal()
def image_token_as_an_object(folder: Path) -> None:
    config(folder, image_token={"__type": "AddedToken", **token("<unk>")})


@equal()
def extra_special_tokens_by_name(folder: Path) -> None:
    config(folder, extra_special_tokens={"image_token": "<unk>", "tool_token": "<eos>"})


@equal()
def additional_special_tokens_by_name(folder: Path) -> None:
    config(folder, additional_special_tokens={"image_token": "<unk>"}, audio_token="<pad>")


@equal()
def extra_special_tokens_listed(folder: Path) -> None:
    config(folder, extra_special_tokens=["<|turn>", "def"])


@equal()
def additional_special_tokens_listed(folder: Path) -> None:
    config(folder, additional_special_tokens=["<|turn>", "<turn|>"])


@equal()
def model_specific_special_tokens(folder: Path) -> None:
    config(folder, model_specific_special_tokens={"image_token": "<unk>"})


@equal()
def model_specific_special_tokens_and_a_named_one(folder: Path) -> None:
    config(folder, model_specific_special_tokens={"image_token": "<unk>"}, audio_token="<eos>")


@equal()
def special_tokens_map_of_older_versions(folder: Path) -> None:
    tokens = {"eos_token": token("<turn|>"), "pad_token": "<eos>", "image_token": "<unk>"}
    edit(folder / "special_tokens_map.json", **tokens)


@equal()
def special_tokens_map_beside_an_added_tokens_decoder(folder: Path) -> None:
    config(folder, added_tokens_decoder={"2": token("<bos>", special=True)})
    edit(folder / "special_tokens_map.json", eos_token=token("<turn|>"))


@equal()
def special_tokens_map_with_extra_tokens_by_name(folder: Path) -> None:
    config(folder, image_token="<unk>", extra_special_tokens=["<|turn>"])
    edit(folder / "special_tokens_map.json", extra_special_tokens={"audio_token": "<eos>"})


@equal()
def special_tokens_map_with_extra_tokens_listed(folder: Path) -> None:
    config(folder, extra_special_tokens=["<|turn>"])
    edit(folder / "special_tokens_map.json", extra_special_tokens=["<|turn>", token("return")])


@equal()
def special_tokens_map_alone(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    edit(folder / "special_tokens_map.json", bos_token="<bos>", eos_token="<turn|>", cls_token="<bos>")


@equal()
def class_of_gemma(folder: Path) -> None:
    config(folder, tokenizer_class="GemmaTokenizer", bos_token=..., eos_token=..., pad_token=..., unk_token=...)


@equal()
def class_of_gemma_with_nulls(folder: Path) -> None:
    config(folder, tokenizer_class="GemmaTokenizerFast", mask_token=None, pad_token=None)


@equal()
def class_of_gemma_named_in_config_json(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    edit(folder / "config.json", tokenizer_class="GemmaTokenizer")


@equal()
def class_of_gemma_with_its_own_list_of_tokens(folder: Path) -> None:
    listed = {"0": "<pad>", "1": "<eos>", "2": "<bos>", "3": "<unk>", "106": "<turn|>"}
    decoder = {i: token(text, special=i != "106") for i, text in listed.items()}
    config(folder, tokenizer_class="GemmaTokenizer", added_tokens_decoder=decoder)


@equal()
def class_of_gemma_without_an_unknown_token(folder: Path) -> None:
    config(folder, tokenizer_class="GemmaTokenizer", unk_token=None)


@equal()
def class_of_the_library(folder: Path) -> None:
    config(folder, tokenizer_class="TokenizersBackend")


@equal("padding of tokenizer.json")
def class_of_gemma_and_padding(folder: Path) -> None:
    config(folder, tokenizer_class="GemmaTokenizer", pad_token=...)
    pad(folder, "<eos>")


# Truncation and padding, as training scripts leave them


def save_after(folder: Path, **options: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer("x", **options)
    tokenizer.save_pretrained(folder)


@equal("truncation of tokenizer.json")
def trained_with_truncation(folder: Path) -> None:
    save_after(folder, truncation=True, max_length=12)


@equal("padding of tokenizer.json")
def trained_with_padding(folder: Path) -> None:
    save_after(folder, padding="max_length", max_length=64)


@equal("truncation and padding of tokenizer.json")
def trained_with_both(folder: Path) -> None:
    save_after(folder, truncation=True, padding="max_length", max_length=12)


@equal("padding of tokenizer.json")
def padding_that_names_the_only_padding_token(folder: Path) -> None:
    config(folder, pad_token=...)
    pad(folder, "<eos>")


@equal("padding of tokenizer.json")
def padding_beside_a_null(folder: Path) -> None:
    config(folder, pad_token=None)
    pad(folder, "<eos>")


# Tokens that are not in tokenizer.json


@equal()
def token_added_in_room_of_the_vocabulary(folder: Path) -> None:
    drop_last(folder)
    config(folder, image_token="<image>")


@equal()
def token_of_added_tokens_json(folder: Path) -> None:
    drop_last(folder)
    (folder / "added_tokens.json").write_text('{"<image>": 4095}', encoding="utf-8")


@equal()
def special_token_of_added_tokens_json(folder: Path) -> None:
    drop_last(folder)
    config(folder, extra_special_tokens=["<image>"])
    (folder / "added_tokens.json").write_text('{"<image>": 4095}', encoding="utf-8")


@equal()
def token_of_an_added_tokens_decoder(folder: Path) -> None:
    drop_last(folder)
    config(folder, added_tokens_decoder={"4095": token("<image>", special=False) | {"rstrip": True}})


@equal()
def token_added_to_the_class_of_gemma(folder: Path) -> None:
    drop_last(folder)
    config(folder, tokenizer_class="GemmaTokenizer", mask_token=None, image_token="<image>")


@equal()
def default_token_of_gemma_in_room_of_the_vocabulary(folder: Path) -> None:
    drop_last(folder)
    config(folder, tokenizer_class="GemmaTokenizer")


@equal("truncation of tokenizer.json")
def token_added_after_training_with_truncation(folder: Path) -> None:
    drop_last(folder)
    save_after(folder, truncation=True, max_length=12)
    config(folder, image_token="<image>")


@equal()
def named_token_that_is_not_special_in_a_list(folder: Path) -> None:
    drop_last(folder)
    config(folder, image_token="<image>", added_tokens_decoder={"4095": token("<image>", special=False)})


@equal()
def named_token_that_is_not_special_as_an_object(folder: Path) -> None:
    drop_last(folder)
    config(folder, image_token={"__type": "AddedToken", **token("<image>", special=False)})


@equal()
def extra_and_additional_special_tokens_by_name(folder: Path) -> None:
    config(folder, extra_special_tokens={"image_token": "<unk>"}, additional_special_tokens={"tool_token": "<pad>"})


@equal()
def word_that_becomes_a_special_token(folder: Path) -> None:
    config(folder, image_token="return")


@pytest.mark.parametrize("name", SUITE.cases)
def test_each(tmp_path: Path, name: str, record_property: Record) -> None:
    SUITE.run(name, tmp_path / "target", record_property)
