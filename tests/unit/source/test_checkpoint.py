"""Checkpoints that are missing, cut short, altered or another's: one clear line each, before anything slow begins."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtp_export.arch.config_keys import unknown_keys
from mtp_export.config import ExportConfig
from mtp_export.errors import CheckpointError
from mtp_export.graph.static import trace_embedder
from mtp_export.pipeline import export
from mtp_export.source.checkpoint import Checkpoint, read_token_ordering
from mtp_export.source.hub import locate
from mtp_export.source.left_aside import left_aside
from mtp_export.weights.mapping import target_parameters
from mtp_export.weights.recipes import RECIPES
from mtp_runtime.errors import UserError
from tests.support.tiny import Tiny
from tests.support.tiny_files import MODELS, rewrite_json, rewrite_tensors, tiny_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


class NothingSlow:
    """Is told of an export's progress, and ends it when the conversion begins."""

    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None:
        raise AssertionError(f"it was not refused before {stage}")

    def advance(self, done: int, name: str = "") -> None: ...


@pytest.fixture(autouse=True)
def known_model(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tiny pair, as it was saved, known as a model."""
    monkeypatch.setitem(MODELS, "tiny", tiny_model(tiny_source))


def config_of(folder: Path, **changes: Any) -> ExportConfig:
    config = ExportConfig(
        model="tiny",
        export_format="tflite",
        target=str(folder / "target"),
        drafter=str(folder / "drafter"),
        recipe="int8",
        output=folder.parent / "output" / "out",
    )
    return dataclasses.replace(config, **changes)


def refusal(folder: Path, **changes: Any) -> str:
    """Export what must not be exported; returns the line with which it is refused, before the conversion begins."""
    config = config_of(folder, **changes)
    with pytest.raises(UserError) as caught:
        export(config, NothingSlow())
    assert caught.value.exit_code == 2
    assert not config.output.parent.exists()
    return str(caught.value)


def tensors_of(folder: Path, change: Callable[[Tensors], None], part: str = "target") -> None:
    rewrite_tensors(folder / part / WEIGHTS, change)


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


class TestTensors:
    @pytest.mark.parametrize(
        ("part", "name"),
        [
            ("target", "model.layers.2.self_attn.q_proj.weight"),
            ("target", "model.layers.0.layer_scalar"),
            ("target", "model.embed_tokens_per_layer.weight"),
            ("target", "model.layers.1.self_attn.k_proj.weight"),
            ("drafter", "masked_embedding.centroids.weight"),
            ("drafter", "masked_embedding.token_ordering"),
            ("drafter", EMBEDDING),
        ],
    )
    def test_a_tensor_that_is_missing(self, tiny: Path, part: str, name: str) -> None:
        tensors_of(tiny, lambda tensors: tensors.__delitem__(name), part)
        assert f"tensor {name} is missing: the checkpoint is incomplete" in refusal(tiny)

    def test_a_file_without_a_text_model(self, tiny: Path) -> None:
        tensors_of(tiny, lambda tensors: tensors.__delitem__(EMBEDDING))
        assert f"tensor {EMBEDDING} is missing: the checkpoint is incomplete" in refusal(tiny)
        tensors_of(tiny, lambda tensors: tensors.clear())
        assert "no tensor …layers.0.… of a text model: this is not a whole Gemma 4 checkpoint" in refusal(tiny)

    @pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj.bias", "surprise"])
    @pytest.mark.parametrize("part", ["target", "drafter"])
    def test_a_tensor_that_nobody_knows_is_left_aside(self, tiny: Path, part: str, name: str) -> None:
        """As transformers leaves it."""
        tensors_of(tiny, lambda tensors: tensors.update({name: torch.zeros(1)}), part)
        checkpoint = Checkpoint(tiny / part, part)
        known = {n: info.shape for n, info in checkpoint.tensors.items() if info.stored != name}
        assert left_aside(checkpoint, known) == (name,)

    @pytest.mark.parametrize("part", ["target", "drafter"])
    @pytest.mark.parametrize(
        ("name", "word"),
        [
            ("model.layers.0.mlp.gate_proj.lora_A.weight", "lora_A"),
            ("model.layers.0.mlp.gate_proj.lora_A.default.weight", "lora_A"),
            ("model.layers.0.mlp.gate_proj.base_layer.weight", "base_layer"),
            ("lm_head.modules_to_save.default.weight", "modules_to_save"),
        ],
    )
    def test_an_adapter_that_is_not_merged(self, tiny: Path, part: str, name: str, word: str) -> None:
        tensors_of(tiny, lambda tensors: tensors.update({name: torch.zeros(1)}), part)
        assert f"tensor {name} is part of an adapter that is not merged ({word}): call merge_and_unload" in refusal(
            tiny
        )

    @pytest.mark.parametrize("shape", [(33, 128), (32, 127), (32,), (), (0, 128), (1, 32, 64)], ids=str)
    def test_a_tensor_of_another_shape(self, tiny: Path, shape: tuple[int, ...]) -> None:
        """Two of these have the right number of values."""
        name = "model.layers.0.self_attn.o_proj.weight"
        tensors_of(tiny, lambda tensors: tensors.update({name: torch.zeros(shape)}))
        assert f"tensor {name} has shape {list(shape)}, config.json asks for [32, 64]" in refusal(tiny)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool], ids=str)
    @pytest.mark.parametrize("part", ["target", "drafter"])
    def test_a_tensor_of_another_dtype(self, tiny: Path, part: str, dtype: torch.dtype) -> None:
        def change(tensors: Tensors) -> None:
            tensors[EMBEDDING] = tensors[EMBEDDING].to(dtype)

        tensors_of(tiny, change, part)
        message = refusal(tiny)
        assert f"tensor {EMBEDDING} has dtype " in message
        assert (
            "expected BF16 or F16 or F32 or F64, or integers that a quantization_config in config.json describes"
            in message
        )

    @pytest.mark.parametrize(
        "order",
        [
            torch.zeros(128, dtype=torch.int64),
            torch.arange(1, 129),
            torch.arange(128) - 1,
            torch.arange(128).roll(1).index_fill(0, torch.tensor(5), 2**40),
        ],
        ids=["all zero", "one too high", "one too low", "one far out"],
    )
    def test_a_token_ordering_that_is_no_permutation(self, tiny: Path, order: torch.Tensor) -> None:
        tensors_of(tiny, lambda tensors: tensors.update({"masked_embedding.token_ordering": order}), "drafter")
        assert "token_ordering is not a permutation of 0…127: the drafter is damaged" in refusal(tiny)

    def test_a_token_ordering_in_floats(self, tiny: Path) -> None:
        order = torch.arange(128.0)
        tensors_of(tiny, lambda tensors: tensors.update({"masked_embedding.token_ordering": order}), "drafter")
        assert "token_ordering has dtype F32, expected I64 or I32" in refusal(tiny)

    def test_a_token_ordering_in_int32(self, tiny: Path) -> None:
        order = torch.randperm(128, generator=torch.Generator().manual_seed(1)).to(torch.int32)
        tensors_of(tiny, lambda tensors: tensors.update({"masked_embedding.token_ordering": order}), "drafter")
        read = read_token_ordering(Checkpoint(tiny / "drafter", "drafter"), "masked_embedding.token_ordering", 128)
        assert read.tolist() == order.tolist()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_a_weight_that_is_no_number(self, tiny: Path, dtype: torch.dtype, value: float) -> None:
        """Weights are read once, while they are written: this is found there."""

        def change(tensors: Tensors) -> None:
            tensors[EMBEDDING] = tensors[EMBEDDING].to(dtype)
            tensors[EMBEDDING][100, 7] = value

        tensors_of(tiny, change)
        checkpoint = Checkpoint(tiny / "target", "target")
        graphs = [trace_embedder(Tiny().target_spec, "embedder")]
        everything = {name: info.shape for name, info in checkpoint.tensors.items()}
        graphs = [dataclasses.replace(graphs[0], weights=everything)]
        rows = target_parameters(checkpoint, graphs, RECIPES["f32"])["embedder"]["embed_tokens.weight"].rows
        assert rows(0, 100).shape == (100, 32)
        with pytest.raises(CheckpointError, match=f"tensor {EMBEDDING} holds NaN or infinity: the weights are damaged"):
            rows(64, 128)


class TestWhereTensorsLie:
    @pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
    def test_the_published_layouts_are_read(self, tiny: Path, prefix: str) -> None:
        """With towers for pictures and sounds, a tied head, and tensors that KV-shared layers do not use."""

        def change(tensors: Tensors) -> None:
            for name in list(tensors):
                tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
            tensors["lm_head.weight"] = tensors[f"{prefix}embed_tokens.weight"].clone()
            extra = ("model.vision_tower.x", "model.embed_audio.y", f"{prefix}layers.5.self_attn.k_proj.weight")
            tensors.update({name: torch.zeros(1) for name in extra})

        tensors_of(tiny, change)
        assert Checkpoint(tiny / "target", "target").names.prefix == prefix
        # All is well with the target: it is the drafter that is refused.
        tensors_of(tiny, lambda tensors: tensors.__delitem__("pre_projection.weight"), "drafter")
        assert "tensor pre_projection.weight is missing" in refusal(tiny)

    def test_a_tensor_that_is_stored_twice(self, tiny: Path) -> None:
        """transformers would take either."""
        tensors_of(tiny, lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"].clone()}))
        assert "norm.weight are one tensor, stored twice: remove one of them" in refusal(tiny)


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
