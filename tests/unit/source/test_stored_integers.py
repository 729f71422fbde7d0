"""Checkpoints of compressed-tensors: packing and meaning against the library itself, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

from mtp_calibration.choose.refinement import MeasuredRefinement
from mtp_export.arch.published import NANO
from mtp_export.cli.export import command, config_of
from mtp_export.config import ExportConfig, RefinementConfig
from mtp_export.errors import CheckpointError
from mtp_export.export import export
from mtp_export.formats.format import format_of
from mtp_export.pair_graphs import Settings, trace_pair
from mtp_export.source import stored_integers
from mtp_export.source.adapters import AdaptedCheckpoint
from mtp_export.source.checkpoint import Checkpoint, TensorInfo
from mtp_export.source.pair import open_pair
from mtp_export.weights.recipes import WeightFormat
from tests.support.refusals import NothingSlow
from tests.support.tiny_files import copy_pair, rewrite_json, rewrite_tensors
from tests.unit.source.test_adapters import save_adapter
from tools.synthesize import layout, quantised
from tools.synthesize.__main__ import synthesize
from tools.synthesize.values import pack_words

ROWS4, GROUPS4 = WeightFormat(bits=4, block_size=0), WeightFormat(bits=4, block_size=32)


@pytest.fixture(scope="module", params=quantised.VARIANTS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """nano's target as one of the published kinds stores it."""
    folder = tmp_path_factory.mktemp("compressed") / "pair"
    synthesize("nano", folder, variant=request.param, depth=Fraction(1), seed=0)
    return Checkpoint(folder / "target", "target")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_are_packed_as_the_library_packs_them(bits: int) -> None:
    values = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, 96)).astype(np.int8)
    words = pack_to_int32(torch.from_numpy(values), bits).numpy()
    np.testing.assert_array_equal(stored_integers.unpack(words, bits), values)
    np.testing.assert_array_equal(pack_words(values, bits), words)


def test_the_library_reads_every_matrix_as_we_do(target: Checkpoint) -> None:
    """Its own reading of the config, and of each packed module."""
    tensors = load_file(target.folder / "model.safetensors")
    config = QuantizationConfig.model_validate(target.config[stored_integers.KEY])
    schemes = {
        (group.weights.num_bits, group.weights.group_size or 0): group
        for group in config.config_groups.values()
        if group.weights is not None
    }
    # A group as wide as the matrix is a whole row.
    rowwise = {(bits, 0): group for (bits, size), group in schemes.items() if size == NANO.target.per_layer_size}
    schemes = rowwise | schemes
    shapes = {t.name: t.shape for t in layout.target_tensors(NANO.target, unused_caches=False) if len(t.shape) == 2}
    seen = set()
    for name, shape in shapes.items():
        canonical = name.removeprefix(layout.TARGET_PREFIX)
        matrix = target.quantised(canonical, shape)
        if matrix is None:
            assert target.tensors[canonical].dtype == "BF16"
            continue
        seen.add((matrix.format.bits, matrix.format.block_size))
        values, scales = target.quantised_rows(matrix, 0, shape[0])
        restored = (values.reshape(*scales.shape, -1) * scales[..., None]).reshape(shape)
        module = name.removesuffix(".weight")
        if matrix.packed:
            state = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == module}
            state["weight_scale"] = state["weight_scale"].float()
            scheme = schemes[matrix.format.bits, matrix.format.block_size]
            theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"].numpy()
        else:
            theirs = tensors[name].numpy() * tensors[f"{module}.weight_scale"].float().numpy()
        np.testing.assert_array_equal(restored, theirs, err_msg=name)
    assert {bits for bits, _ in seen} == {bits for bits, _ in schemes}


def changed(config: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    place = config[stored_integers.KEY]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("quant_method",), "gemma", "quant_method = 'gemma', expected 'compressed-tensors'"),
        (("quant_method",), None, "quant_method = None, expected 'compressed-tensors'"),
        (("format",), "nvfp4-pack-quantized", "format is 'nvfp4-pack-quantized'"),
        (("quantization_status",), "initialized", "quantization_status is 'initialized'"),
        (("transform_config",), {"config_groups": {"u": {}}}, "transform_config is {"),
        (("rotation",), "hadamard", "unknown field `rotation`"),
        (("config_groups", "group_0", "weights", "num_bits"), 3, "group_0: num_bits is 3, expected 2 or 4 or 8"),
        (("config_groups", "group_0", "weights", "type"), "float", "type is 'float', expected 'int'"),
        (("config_groups", "group_0", "weights", "symmetric"), False, "symmetric is False, expected True"),
        (("config_groups", "group_0", "weights", "strategy"), "tensor", "strategy is 'tensor'"),
        (("config_groups", "group_0", "weights", "actorder"), "group", "actorder is 'group'"),
        (("config_groups", "group_0", "weights", "group_size"), 0, "group_size is 0"),
        (("config_groups", "group_0", "weights", "colour"), 1, "unknown field `colour`"),
        (("config_groups",), [], "Expected `object`, got `array` - at `$.config_groups`"),
    ],
)
def test_another_way_to_quantise_is_refused(path: tuple[str, ...], value: Any, message: str) -> None:
    config = {stored_integers.KEY: quantised.quantization_config(quantised.W4A16, 32)}
    assert stored_integers.read_quantization(config, "config.json") == {GROUPS4}
    with pytest.raises(CheckpointError) as caught:
        stored_integers.read_quantization(changed(config, *path, value=value), "config.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json")


def header(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(file=Path("model.safetensors"), stored="", shape=shape, dtype=dtype)


STORED = {"m.weight_packed": header("I32", 6, 8), "m.weight_scale": header("F32", 6, 1)}
STORED["m.weight_shape"] = header("I64", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("m.weight_scale"), "m.weight_scale is missing"),
        (lambda t: t.pop("m.weight_shape"), "m.weight_shape is missing"),
        (lambda t: t.update({"m.weight_zero_point": header("I32", 1, 1)}), "has a weight_zero_point"),
        (lambda t: t.update({"m.weight_packed": header("I32", 6, 7)}), "is stored as I32 [6, 7]"),
        (lambda t: t.update({"m.weight_packed": header("I64", 6, 8)}), "is stored as I64 [6, 8]"),
        (lambda t: t.update({"m.weight_packed": header("I32", 6, 4)}), "is stored at 2 bits"),
        (lambda t: t.update({"m.weight_scale": header("F32", 6, 3)}), "has scales [6, 3]"),
        (lambda t: t.update({"m.weight_scale": header("F32", 6, 2)}), "in groups of 32, quantization_config names"),
        (lambda t: t.update({"m.weight_scale": header("F32", 6)}), "has scales [6]"),
    ],
)
def test_tensors_that_contradict_are_refused(change: Callable[[dict[str, TensorInfo]], Any], message: str) -> None:
    formats, tensors = frozenset({ROWS4}), dict(STORED)
    matrix = stored_integers.find(tensors, "m.weight", (6, 64), formats, "folder")
    assert matrix is not None
    assert (matrix.format, matrix.packed) == (ROWS4, True)
    change(tensors)
    with pytest.raises(CheckpointError, match="folder") as caught:
        stored_integers.find(tensors, "m.weight", (6, 64), formats, "folder")
    assert message in str(caught.value)


def test_a_stated_shape_that_is_another_is_refused(target: Checkpoint, tmp_path: Path) -> None:
    folder = copy_pair(target.folder, tmp_path / "target")
    name = "layers.0.mlp.up_proj"
    stored = f"{layout.TARGET_PREFIX}{name}.weight_shape"
    rewrite_tensors(folder / "model.safetensors", lambda t: t.update({stored: torch.tensor([256, 512])}))
    damaged = Checkpoint(folder, "target")
    matrix = damaged.quantised(f"{name}.weight", (512, 256))
    assert matrix is not None
    with pytest.raises(CheckpointError, match=r"weight_shape is \[256, 512\], config.json asks for \[512, 256\]"):
        damaged.quantised_rows(matrix, 0, 8)


def test_a_block_whose_scale_is_zero_is_one_of_zeros() -> None:
    matrix = stored_integers.StoredMatrix(name="m.weight", shape=(1, 64), format=GROUPS4, packed=False)
    values, scales = matrix.rows(np.full((1, 64), 3, np.int8), np.array([[0.0, 0.5]], np.float32))
    assert (values[0, :32] == 0).all()
    assert (values[0, 32:] == 3).all()
    assert scales.tolist() == [[2.0**-14, 0.5]]


@pytest.mark.parametrize(
    ("format", "export_format", "looked_up"),
    [
        (WeightFormat(bits=2, block_size=32), "tflite", False),
        (WeightFormat(bits=8, block_size=128), "tflite", True),
        (WeightFormat(bits=4, block_size=16), "onnx", False),
    ],
)
def test_what_has_no_kernel_is_refused(format: WeightFormat, export_format: str, looked_up: bool) -> None:
    rows = WeightFormat(bits=format.bits, block_size=0)
    stored_integers.check_runs("m", rows, export_format, looked_up=looked_up)
    with pytest.raises(CheckpointError, match=f"m is stored at {format.bits} bits in groups of {format.block_size}"):
        stored_integers.check_runs("m", format, export_format, looked_up=looked_up)


def test_an_adapter_is_not_merged_into_integers(target: Checkpoint, tiny: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny / "target")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj as integers") as caught:
        AdaptedCheckpoint(target.folder, "target", [adapter])
    assert "quantise it anew" in str(caught.value)


def config_for(target: Checkpoint, output: Path, drafter: Path) -> ExportConfig:
    arguments = ["--model", "nano", "--checkpoint", str(target.folder), "--drafter", str(drafter), "--recipe", "f32"]
    options = dict(command.make_context("export", [*arguments, "--output", str(output)]).params)
    return config_of(
        {name: value for name, value in options.items() if name not in ("dry_run", "resume", "as_json", "debug")}
    )


def test_the_recipe_is_for_what_is_stored_in_floats(target: Checkpoint, tmp_path: Path) -> None:
    config = config_for(target, tmp_path / "out", target.folder.parent / "drafter")
    traced = trace_pair(Settings(config=config, pair=open_pair(config.source)), format_of(config.format))
    stored = {
        (name.split(".")[-2], parameter.format.bits, parameter.format.block_size)
        for part in ("target", "embedder", "per_layer_embedder")
        for name, parameter in traced.values[part].items()
        if len(parameter.shape) == 2
    }
    kinds = {module: (bits, block) for module, bits, block in stored}
    if stored_integers.read_quantization(target.config, "config.json") == {GROUPS4}:
        assert (kinds["embed_tokens"], kinds["embed_tokens_per_layer"]) == ((32, 0), (32, 0))
        assert (kinds["up_proj"], kinds["per_layer_model_projection"]) == ((4, 32), (4, 32))
    else:
        assert (kinds["embed_tokens"], kinds["embed_tokens_per_layer"]) == ((2, 0), (2, 32))
        assert (kinds["up_proj"], kinds["per_layer_model_projection"]) == ((4, 0), (8, 0))
    assert len(stored) == len(kinds), "a module is stored in one way in all layers"


def test_the_gate_has_nothing_to_hold_integers_against(target: Checkpoint, tmp_path: Path) -> None:
    config = config_for(target, tmp_path / "out", target.folder.parent / "drafter")
    gated = dataclasses.replace(config, refinement=RefinementConfig(gate=True))
    with pytest.raises(CheckpointError, match="the target is stored as integers, and there are no floats"):
        export(gated, NothingSlow(), MeasuredRefinement())


def test_a_drafter_in_integers_is_refused(target: Checkpoint, tmp_path: Path) -> None:
    drafter = copy_pair(target.folder.parent / "drafter", tmp_path / "drafter")
    rewrite_json(drafter / "config.json", {stored_integers.KEY: target.config[stored_integers.KEY]})
    name = "pre_projection.weight"
    rewrite_tensors(drafter / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match="the drafter is stored as integers, expected floats"):
        open_pair(config_for(target, tmp_path / "out", drafter).source)
