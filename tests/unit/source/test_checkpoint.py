"""Files of a checkpoint that are missing, cut short or another's: one clear line each, before anything slow begins."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtp_export.arch.config_keys import unknown_keys
from mtp_export.errors import CheckpointError
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.hub import locate
from tests.support.refusals import EMBEDDING, INDEX, WEIGHTS, refusal
from tests.support.tiny_files import MODELS, rewrite_json, rewrite_tensors, tiny_model


@pytest.fixture(autouse=True)
def known_model(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tiny pair, as it was saved, known as a model."""
    monkeypatch.setitem(MODELS, "tiny", tiny_model(tiny_source))


class TestFiles:
    def test_a_folder_that_is_not_there(self, tiny: Path) -> None:
        assert "no target checkpoint at" in refusal(tiny, target=str(tiny / "nowhere"))
        assert "no drafter checkpoint at" in refusal(tiny, drafter=str(tiny / "nowhere"))
        assert "no target checkpoint at" in refusal(tiny, target=str(tiny / "target" / "config.json"))
        assert "no target checkpoint at" in refusal(tiny, target="./nowhere")
        assert "no target checkpoint at" in refusal(tiny, target="~nobody-of-that-name/gemma")
        assert "no target checkpoint at" in refusal(tiny, target="/" + "x" * 5000)
        assert "no target checkpoint at" in refusal(tiny, target="nul\0byte")

    @pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
    def test_a_file_that_is_missing(self, tiny: Path, name: str) -> None:
        (tiny / "target" / name).unlink()
        assert f"{name} is missing: the target checkpoint is incomplete" in refusal(tiny)

    def test_the_weights_in_pickled_form_only(self, tiny: Path) -> None:
        weights = tiny / "target" / WEIGHTS
        torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()
        assert "has only pickled weights, which can run code when loaded: save it as safetensors" in refusal(tiny)

    def test_a_pickle_under_the_name_of_safetensors(self, tiny: Path) -> None:
        torch.save({"weight": torch.zeros(3)}, tiny / "target" / WEIGHTS)
        assert "is damaged or truncated" in refusal(tiny)

    def test_weights_that_end_anywhere(self, tiny: Path) -> None:
        weights = tiny / "target" / WEIGHTS
        content = weights.read_bytes()
        header_end = 8 + struct.unpack_from("<Q", content)[0]
        step = (len(content) - header_end) // 20
        for size in (0, 1, 7, 8, 9, 100, header_end - 1, header_end, *range(header_end + 1, len(content), step), -1):
            weights.write_bytes(content[:size])
            with pytest.raises(CheckpointError, match=r"damaged or truncated.*download it again"):
                Checkpoint(tiny / "target", "target")
        assert f"{WEIGHTS} is damaged or truncated" in refusal(tiny)

    @pytest.mark.parametrize("size", [2**64 - 1, 2**63, 2**40, 100_000_001, 0])
    def test_a_header_of_impossible_length(self, tiny: Path, size: int) -> None:
        weights = tiny / "drafter" / WEIGHTS
        weights.write_bytes(struct.pack("<Q", size) + weights.read_bytes()[8:])
        assert "damaged or truncated" in refusal(tiny)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
    @pytest.mark.parametrize("kind", ["folder", "device", "loop of links", "not UTF-8", "too large"])
    def test_text_that_is_none(self, tiny: Path, name: str, kind: str) -> None:
        path = tiny / "target" / name
        path.unlink(missing_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/null")
        elif kind == "loop of links":
            path.symlink_to(path)
        elif kind == "not UTF-8":
            path.write_bytes(b"\xff\xfe{}")
        else:
            os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 65 << 20)
        if name in ("config.json", "tokenizer.json") or kind in ("not UTF-8", "too large"):
            message = refusal(tiny)
            assert name in message
            assert ("is not a file" in message) == (kind in ("folder", "device"))
            assert ("is larger than 64 MiB" in message) == (kind == "too large")
        else:  # these may be absent, and what is no file is as good as absent
            checkpoint = Checkpoint(tiny / "target", "target")
            assert not checkpoint.has(name)
            with pytest.raises(CheckpointError, match=name):
                checkpoint.read_text(name)

    def test_a_pipe_is_not_waited_for(self, tiny: Path) -> None:
        (tiny / "target" / "config.json").unlink()
        os.mkfifo(tiny / "target" / "config.json")
        assert "config.json is not a file" in refusal(tiny)

    def test_weights_behind_a_loop_of_links(self, tiny: Path) -> None:
        weights = tiny / "target" / WEIGHTS
        weights.unlink()
        weights.symlink_to(weights)
        assert f"{WEIGHTS} is missing" in refusal(tiny)


class TestIndex:
    @pytest.fixture
    def shards(self, tiny: Path) -> Path:
        """The target in two files and an index."""
        folder = tiny / "target"
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        places = {name: f"part-{int(i > len(names) // 2)}.safetensors" for i, name in enumerate(names)}
        for shard in set(places.values()):
            save_file({name: tensors[name] for name in names if places[name] == shard}, folder / shard)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return tiny

    def test_shards_are_one_checkpoint(self, shards: Path, tiny_source: Path) -> None:
        whole = Checkpoint(tiny_source / "target", "target")
        parts = Checkpoint(shards / "target", "target")
        assert {n: (t.shape, t.dtype) for n, t in parts.tensors.items()} == {
            n: (t.shape, t.dtype) for n, t in whole.tensors.items()
        }
        assert (parts.rows("embed_tokens.weight", 3, 9) == whole.rows("embed_tokens.weight", 3, 9)).all()
        assert [path.name for path in parts.files()][-3:] == [INDEX, "part-0.safetensors", "part-1.safetensors"]

    def test_a_shard_that_is_missing(self, shards: Path) -> None:
        (shards / "target" / "part-1.safetensors").unlink()
        assert "part-1.safetensors is missing: the target checkpoint is incomplete" in refusal(shards)

    def test_a_tensor_in_two_shards(self, shards: Path) -> None:
        path = shards / "target" / "part-1.safetensors"
        rewrite_tensors(path, lambda tensors: tensors.update({EMBEDDING: torch.zeros(128, 32)}))
        message = refusal(shards)
        assert f"tensor {EMBEDDING} lies in part-0.safetensors and in" in message
        assert "contradicts itself" in message

    @pytest.mark.parametrize(
        "shard", ["../drafter/model.safetensors", "/etc/passwd", "..", ".", "", "a/../b", "a\\b", "a\0b"]
    )
    def test_a_name_out_of_the_folder(self, shards: Path, shard: str) -> None:
        rewrite_json(shards / "target" / INDEX, {"weight_map": {EMBEDDING: shard}})
        assert f"names the unsafe file {shard!r}" in refusal(shards)

    @pytest.mark.parametrize("shard", ["x" * 5000, "\ud800", "config"])
    def test_a_name_that_is_no_file(self, shards: Path, shard: str) -> None:
        rewrite_json(shards / "target" / INDEX, {"weight_map": {EMBEDDING: shard}})
        assert "is missing" in refusal(shards)

    @pytest.mark.parametrize(
        "index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
    )
    def test_an_index_without_a_map(self, shards: Path, index: str) -> None:
        (shards / "target" / INDEX).write_text(index)
        assert f"{INDEX} has no valid weight_map: download it again" in refusal(shards)

    def test_an_index_that_is_no_json(self, shards: Path) -> None:
        (shards / "target" / INDEX).write_text("{")
        assert f"{INDEX} is not JSON" in refusal(shards)


class TestJson:
    @pytest.mark.parametrize(
        "text",
        ["", "{", "nothing", "{'a': 1}", '{"a": 1,}', "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "{}{}"],
        ids=lambda text: repr(text[:10]),
    )
    @pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
    def test_what_is_no_json(self, tiny: Path, name: str, text: str) -> None:
        (tiny / "target" / name).write_text(text, encoding="utf-8")
        assert f"{name} is not JSON" in refusal(tiny)

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
    def test_a_byte_order_mark(self, tiny: Path, name: str) -> None:
        (tiny / "target" / name).write_text("\ufeff{}", encoding="utf-8")
        assert f"{name} begins with a byte order mark: save it as UTF-8 without one" in refusal(tiny)

    def test_a_value_nested_as_deep_as_json_goes(self, tiny: Path) -> None:
        """Deep enough to be shown only in part."""
        for depth in range(900, 1000, 7):
            nested = "[" * depth + "]" * depth
            config = json.loads((tiny / "target" / "config.json").read_text())
            text = json.dumps(config | {"surprise": 0}).replace('"surprise": 0', f'"surprise": {nested}')
            (tiny / "target" / "config.json").write_text(text)
            try:
                config_of_text = Checkpoint(tiny / "target", "target").config
            except CheckpointError as error:
                assert "not JSON" in str(error)  # noqa: PT017  # the depth at which the parser gives up is its own
            else:
                assert unknown_keys(config_of_text) == ("surprise",)
            (tiny / "target" / "config.json").write_text(json.dumps(config))

    @pytest.mark.parametrize(
        ("part", "changes", "message"),
        [
            ("target", {"hidden_size": ...}, "has hidden_size = 2304, but tiny has 32"),
            ("target", {"attention_k_eq_v": True}, "attention_k_eq_v is True, expected False"),
            ("target", {"hidden_size": 64}, "has hidden_size = 64, but tiny has 32"),
            ("drafter", {"backbone_hidden_size": 64}, "backbone_hidden_size is 64, the target's hidden_size is 32"),
            ("drafter", {"num_centroids": 24}, "num_centroids is 24, expected a divisor of vocab_size = 128"),
            ("drafter", {"centroid_intermediate_top_k": 17}, "is 17, expected at most num_centroids = 16"),
            ("drafter", {"num_centroids": 32}, "centroids.weight has shape [16, 24], config.json asks for [32, 24]"),
        ],
    )
    def test_a_config_that_does_not_fit(self, tiny: Path, part: str, changes: dict[str, Any], message: str) -> None:
        rewrite_json(tiny / part / "config.json", changes)
        assert message in refusal(tiny)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ([], "expected an object, got list"),
            ({"eos_token_id": [1, True]}, "eos_token_id is [1, True], expected a token id"),
            ({"eos_token_id": "1"}, "eos_token_id is '1', expected a token id"),
            ({"suppress_tokens": 5.0}, "suppress_tokens is 5.0, expected a token id"),
            ({"do_sample": 1}, "do_sample is 1, expected true or false"),
            ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot', expected a finite number"),
            ({"do_sample": True, "temperature": -1}, "temperature is -1.0, expected 0 or more"),
            ({"do_sample": True, "top_k": -1}, "top_k is -1, expected a positive integer, or 0 for all"),
            ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5, expected 0 to 1"),
            ({"repetition_penalty": 0}, "repetition_penalty is 0.0, expected more than 0"),
        ],
    )
    def test_a_generation_config_that_cannot_be(self, tiny: Path, value: Any, message: str) -> None:
        (tiny / "target" / "generation_config.json").write_text(json.dumps(value))
        assert f"generation_config.json: {message}" in refusal(tiny)

    @pytest.mark.parametrize("text", ["{}", "[]", "nothing", '{"model": {"type": "BPE"}}'])
    def test_a_tokenizer_that_is_none(self, tiny: Path, text: str) -> None:
        (tiny / "target" / "tokenizer.json").write_text(text)
        assert "tokenizer.json is not a tokenizer" in refusal(tiny)

    def test_a_chat_template_of_broken_unicode(self, tiny: Path) -> None:
        (tiny / "target" / "chat_template.jinja").unlink()
        (tiny / "target" / "tokenizer_config.json").write_text('{"chat_template": "\\ud800"}')
        assert "tokenizer_config.json: chat_template is not Unicode" in refusal(tiny)


class TestLocate:
    @pytest.fixture(autouse=True)
    def offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.chdir(tmp_path)

    def test_an_id_that_is_not_cached(self) -> None:
        with pytest.raises(CheckpointError, match="acme/gemma is neither a folder nor in the Hugging Face cache"):
            locate("acme/gemma")

    @pytest.mark.parametrize("source", ["a--b/c", "acme/gemma..x", "acme/gemma.git", "acme/" + "x" * 200])
    def test_an_id_that_cannot_be(self, source: str) -> None:
        with pytest.raises(CheckpointError, match="cannot download"):
            locate(source)

    def test_a_folder_of_that_name_comes_first(self, tmp_path: Path) -> None:
        (tmp_path / "acme" / "gemma").mkdir(parents=True)
        assert locate("acme/gemma") == Path("acme/gemma")

    def test_a_cached_id_is_found(self, tmp_path: Path) -> None:
        """The layout of the hub's own cache."""
        repo = tmp_path / "hub" / "models--acme--gemma"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        snapshot = repo / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        assert locate("acme/gemma") == snapshot
