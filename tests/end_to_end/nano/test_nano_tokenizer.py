"""nano's tokenizer: Gemma 4's special tokens in their roles, and the same ids from Hugging Face's tokenizers, from
onnxruntime-genai and from SentencePiece."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime_genai
import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mtp_export.source.embedded import EMBEDDED
from mtp_runtime.text.chat import render_chat
from tests.support.places import PUBLISHED, ROOT
from tools.train_nano.as_sentencepiece import sentencepiece_model
from tools.train_nano.nano_ids import STOP_IDS
from tools.train_nano.nano_tokenizer import CONTROL, SPECIAL

FOLDER = EMBEDDED / "target"
FEWEST_TOKENS = 200_000
# Bytes. onnxruntime-genai cuts what has no space for longer than 100 with it, whatever the tokenizer, Gemma's too.
LONGEST_WORD = 97
EMOJI = ("🙂", "👩‍👩‍👧", "🇩🇪", "❤️", "👍🏽", "🧑🏿‍🚀")


def corpus() -> Iterator[str]:
    """Code and prose of this repository, every script, emoji, and runs of spaces and signs, in pieces."""
    for folder in ("converter", "runtime_py", "calibration", "tools", "docs", "android_demo", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".md", ".kt", ".html", ".xml"):
                text = path.read_text(encoding="utf-8")
                yield from (text[start : start + 2000] for start in range(0, len(text), 2000))
    rng = random.Random(0)
    for _ in range(300):
        ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x2000), (0x3040, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F700)]
        written = [chr(rng.randrange(*rng.choice(ranges))) for _ in range(80)]
        yield " ".join("".join(written[start : start + 8]) for start in range(0, 80, 8))
        runs = [rng.choice([" ", "\n", "\t", "-", "=", "_", "a", "("]) * rng.randrange(1, 24) for _ in range(8)]
        yield " ".join([*runs, *(rng.choice(EMOJI) * rng.randrange(1, 4) for _ in range(4))])


def longest_word(text: str) -> int:
    return max(len(word.encode()) for word in text.split(" "))


@pytest.fixture(scope="module")
def encoded() -> list[tuple[str, list[int]]]:
    """The corpus with the ids of Hugging Face's tokenizers."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    texts = [text for text in corpus() if not any(token in text for token in CONTROL | {"<unk>": 3})]
    pairs = [(text, tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    for text, ids in pairs:
        assert "▁" in text or tokenizer.decode(ids, skip_special_tokens=False) == text
    return pairs


def test_sentencepiece_says_the_same(encoded: list[tuple[str, list[int]]]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(FOLDER / "tokenizer.json"))
    assert processor.vocab_size() == 4096
    assert [text for text, ids in encoded if processor.encode(text) != ids] == []
    assert sum(len(ids) for _, ids in encoded) > FEWEST_TOKENS
    assert all(processor.decode(ids) == text for text, ids in encoded if "▁" not in text and "<|" not in text)


def test_onnxruntime_genai_says_the_same(encoded: list[tuple[str, list[int]]], tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    model: dict[str, Any] = {"type": "gemma4_text", "vocab_size": 4096, "context_length": 4096, "decoder": {}}
    model |= {"bos_token_id": 2, "eos_token_id": list(STOP_IDS), "pad_token_id": 0}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": model, "search": {}}))
    tokenizer = onnxruntime_genai.Tokenizer(str(tmp_path))
    compared = [(text, ids) for text, ids in encoded if longest_word(text) <= LONGEST_WORD]
    assert len(compared) > 0.9 * len(encoded)
    assert sum(any(emoji in text for emoji in EMOJI) for text, _ in compared) > 250
    assert [text for text, ids in compared if tokenizer.encode(text).tolist() != ids] == []
    assert sum(len(ids) for _, ids in compared) > FEWEST_TOKENS
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    ours = render_chat(
        (FOLDER / "chat_template.jinja").read_text(), conversation, special_tokens={"bos_token": "<bos>"}
    )
    assert tokenizer.apply_chat_template(json.dumps(conversation)) == ours
    assert tokenizer.encode(ours).tolist() == AutoTokenizer.from_pretrained(FOLDER).encode(ours)


def test_every_special_token_is_one_id_and_has_its_name() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    config = json.loads((FOLDER / "config.json").read_text())
    for token, token_id in SPECIAL.items():
        assert tokenizer.encode(f"a{token} b", add_special_tokens=False)[1] == token_id
        assert token in tokenizer.all_special_tokens or token == "<|video|>"
    for name in ("image", "audio", "boi", "eoi", "boa", "eoa"):
        assert getattr(tokenizer, f"{name}_token_id") == config[f"{name}_token_id"]
    assert json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"] == [1, 106, 50]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published configs are not beside this checkout")
def test_the_template_names_no_token_that_nano_lacks() -> None:
    """Those that the published template writes are nano's too."""
    written = set(re.findall(r"<\|[^>{}' ]*>|<[a-z_]+\|>", (PUBLISHED / "chat_template_e2b_hf.jinja").read_text()))
    assert written >= {"<|turn>", "<turn|>", '<|"|>', "<|think|>", "<|channel>", "<|tool_call>", "<|image|>"}
    assert written <= set(SPECIAL)
