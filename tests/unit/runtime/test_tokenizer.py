"""Token ids, text, and text that grows token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtp_runtime.errors import BundleError, UserError
from mtp_runtime.text.tokenizer import Tokenizer
from tests.support import toy_pair

EOS, BOS, DEF, ADD, S, SPACE = 1, 2, 4, 5, 6, 7
# é is C3 A9, € is E2 82 AC; the bytes are in order in the vocabulary.
BYTE = {byte: 8 + index for index, byte in enumerate(sorted({*"é€".encode()}))}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(toy_pair.tokenizer_json(), encoding="utf-8")
    return Tokenizer.open(path, BOS)


def test_a_prompt_begins_with_bos_once(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("s") == [BOS, S]
    assert tokenizer.encode("<bos>s") == [BOS, S]
    assert tokenizer.encode("") == [BOS]


def test_a_prompt_that_is_not_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="not valid Unicode"):
        tokenizer.encode("\ud800")


def test_special_tokens_are_left_out_of_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([BOS, DEF, ADD, S, EOS]) == " def adds"
    assert tokenizer.decode([BOS, S], skip_special_tokens=False) == "<bos>s"


def test_a_character_appears_when_its_last_byte_does(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    ids = [S, *(BYTE[byte] for byte in "é€".encode()), S]
    assert [stream.push(token) for token in ids] == ["s", "", "é", "", "", "€", "s"]
    assert stream.finish() == ""


def test_an_incomplete_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert [stream.push(token) for token in (S, BYTE[0xE2], BYTE[0x82])] == ["s", "", ""]
    assert set(stream.finish()) == {"\ufffd"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 63), max_size=30))
def test_the_pieces_joined_are_the_whole_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    assert "".join([*(stream.push(token) for token in ids), stream.finish()]) == tokenizer.decode(ids)


def test_a_space_that_only_a_first_token_loses_is_kept(tmp_path: Path) -> None:
    document = json.loads(toy_pair.tokenizer_json())
    document["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    stream = Tokenizer.open(path, BOS).stream()
    assert [stream.push(token) for token in (DEF, ADD, S, DEF)] == ["def", " add", "s", " def"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', "nonsense"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Tokenizer.open(path, BOS)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="cannot read the tokenizer"):
        Tokenizer.open(path, BOS)
