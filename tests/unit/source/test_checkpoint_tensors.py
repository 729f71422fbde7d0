"""Tensors of a checkpoint that are missing, altered or stored twice: one clear line each, before the conversion."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mtp_export.errors import CheckpointError
from mtp_export.graph.static import trace_embedder
from mtp_export.source.checkpoint import Checkpoint, read_token_ordering
from mtp_export.source.left_aside import left_aside
from mtp_export.weights.mapping import target_parameters
from mtp_export.weights.recipes import RECIPES
from tests.support.refusals import EMBEDDING, Tensors, refusal, tensors_of
from tests.support.tiny import Tiny
from tests.support.tiny_files import MODELS, tiny_model


@pytest.fixture(autouse=True)
def known_model(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tiny pair, as it was saved, known as a model."""
    monkeypatch.setitem(MODELS, "tiny", tiny_model(tiny_source))


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
