"""Synthesised towers, their configs and an adapter over them: the layout that transformers and PEFT read."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma4AssistantConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
)
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from mtp_export.arch import published
from mtp_runtime.errors import UserError
from tests.support.places import PUBLISHED
from tools.synthesize import files, finetune, layout, media, quantised, texts, towers
from tools.synthesize.__main__ import VARIANTS, Extras, synthesize
from tools.synthesize.layout import StoredTensor

FULL_SIZE = {"e2b": published.E2B, "e4b": published.E4B}
PLAIN, LATTICE = VARIANTS[:2]
TUNED = Extras(towers=True, leftovers=finetune.UNSLOTH, adapter_rank=4)
Names = dict[str, tuple[int, ...]]
Modules = dict[str, torch.nn.Module]


def write(folder: Path, *, variant: str = PLAIN, depth: Fraction = Fraction(1), extras: Extras = TUNED) -> Path:
    synthesize("nano", folder, variant=variant, depth=depth, seed=0, extras=extras)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return nano's pair with small towers, Unsloth's keys and an adapter. Do not change it."""
    return write(tmp_path_factory.mktemp("towers") / "pair")


@pytest.fixture(scope="module")
def meta() -> Callable[[str], Gemma4ForConditionalGeneration]:
    """Return a full-size model of transformers without its values."""
    models: dict[str, Gemma4ForConditionalGeneration] = {}

    def model(name: str) -> Gemma4ForConditionalGeneration:
        if name not in models:
            config = texts.target_config(FULL_SIZE[name].target, towers.PUBLISHED)
            with torch.device("meta"):
                models[name] = Gemma4ForConditionalGeneration(Gemma4Config(**config))
        return models[name]

    return model


def shapes(tensors: Sequence[StoredTensor]) -> Names:
    return {tensor.name: tensor.shape for tensor in tensors}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def whole_target(name: str, *, unused_caches: bool) -> list[StoredTensor]:
    target = FULL_SIZE[name].target
    text = layout.target_tensors(target, unused_caches=unused_caches)
    return text + towers.tensors_of(towers.PUBLISHED, target.hidden_size)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_target_has_the_layout_of_transformers(
    name: str, meta: Callable[[str], Gemma4ForConditionalGeneration]
) -> None:
    """Parameters and stored buffers, the bounds of clipped layers among them."""
    theirs = {key: tuple(t.shape) for key, t in meta(name).state_dict().items() if key != "lm_head.weight"}
    ours = whole_target(name, unused_caches=False)
    assert shapes(ours) == theirs
    assert len(ours) == len(theirs)
    assert {tensor.dtype for tensor in ours} == {"BF16"}
    assert sum(not shape for shape in theirs.values()) == 448 + 480


def test_an_e2b_is_as_long_as_the_published_file() -> None:
    tensors = whole_target("e2b", unused_caches=True)
    assert len(files.header(tensors)) + sum(tensor.size_bytes for tensor in tensors) == 10_246_621_918


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_configs_are_the_published_ones(name: str) -> None:
    if not PUBLISHED.is_dir():
        pytest.skip("the published configs are not here")
    pair = FULL_SIZE[name]
    assert texts.target_config(pair.target, towers.PUBLISHED) == read(PUBLISHED / f"{name}-it" / "config.json")
    drafter = texts.published_drafter_config(pair.drafter, pair.target.max_position_embeddings, qat=False)
    assert drafter == read(PUBLISHED / f"{name}-it-assistant" / "config.json")


def test_a_drafter_of_quantisation_aware_training_has_stop_ids_too() -> None:
    plain, qat = (texts.published_drafter_config(published.E2B.drafter, 131072, qat=qat) for qat in (False, True))
    assert qat == plain | {"eos_token_id": [1, 106]}


def load(folder: Path) -> Any:
    """As AutoModelForCausalLM does, every tensor of the file and no other."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    model, report = loaded
    assert not any(report.values()), report
    return model.train(False)


@pytest.mark.parametrize("depth", ["1", "1/3"])
def test_transformers_loads_every_tensor(depth: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "pair", depth=Fraction(depth), extras=Extras(towers=True))
    model = load(folder / "target")
    assert type(model).__name__ == "Gemma4ForConditionalGeneration"
    assert model.config.vision_config.num_hidden_layers == {"1": 3, "1/3": 1}[depth]
    assert model.config.audio_config.num_hidden_layers == {"1": 2, "1/3": 1}[depth]
    with safe_open(folder / "target" / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  not a dict
    loaded = {name for name in model.state_dict() if name != "lm_head.weight"}
    assert loaded <= stored.keys()
    unused = {name for name in stored if name not in loaded}
    assert all(name.startswith(layout.TARGET_PREFIX) for name in unused), unused
    assert set(stored.values()) == {"BF16"}
    config: Any = Gemma4AssistantConfig.from_pretrained(folder / "drafter")
    assert config.text_config.num_hidden_layers == published.NANO.drafter.num_layers


def soft_tokens(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of one image and one clip."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.cartesian_prod(torch.arange(6), torch.arange(9))[None]
    pixels = torch.rand(1, 54, 768, generator=generator)
    frames = torch.randn(1, 40, 128, generator=generator)
    with torch.no_grad():
        image = model.model.get_image_features(pixel_values=pixels, image_position_ids=positions).pooler_output[0]
        clip = model.model.get_audio_features(frames, torch.ones(1, 40, dtype=torch.bool)).pooler_output[0]
    return image, clip


def test_towers_give_finite_rows_of_the_size_of_embeddings_and_need_their_bounds(tuned: Path) -> None:
    model = load(tuned / "target")
    rows = soft_tokens(model)
    for values in rows:
        assert values.shape == (values.shape[0], published.NANO.target.hidden_size)
        assert bool(values.isfinite().all())
        assert 0.3 < float(values.std()) < 3.0
    for name, bound in model.named_buffers():
        if name.endswith(("_min", "_max")):
            assert 2.0 < abs(float(bound)) < 4.0
            assert (float(bound) < 0) == name.endswith("_min")
            bound.mul_(1e6)
    for with_bounds, without in zip(rows, soft_tokens(model), strict=True):
        assert float((with_bounds - without).abs().max()) > 0.05


def test_the_text_model_is_the_same_with_towers_and_without(tuned: Path, tmp_path: Path) -> None:
    bare = write(tmp_path / "pair", extras=Extras())
    assert (bare / "drafter" / "model.safetensors").read_bytes() == (
        tuned / "drafter" / "model.safetensors"
    ).read_bytes()
    names = ("target/model.safetensors",) * 2
    with safe_open(bare / names[0], framework="pt") as ours, safe_open(tuned / names[1], framework="pt") as whole:
        for name in ours.keys():  # noqa: SIM118  not a dict
            assert torch.equal(ours.get_tensor(name), whole.get_tensor(name)), name


@pytest.mark.parametrize("variant", [LATTICE, quantised.W4A16])
def test_towers_of_other_variants_are_bfloat16(variant: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "pair", variant=variant, extras=Extras(towers=True))
    with safe_open(folder / "target" / "model.safetensors", framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        expected = shapes(towers.tensors_of(towers.SMALL, published.NANO.target.hidden_size))
        assert stored.items() >= expected.items()
        assert {file.get_slice(name).get_dtype() for name in expected} == {"BF16"}
    assert read(folder / "drafter" / "config.json")["eos_token_id"] == [1, 106]


def test_a_variant_whose_towers_are_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="qat-mobile-ct stores its towers is not known: leave --towers out"):
        write(tmp_path / "pair", variant=quantised.MOBILE)
    assert not list(tmp_path.iterdir())


def test_the_sampler_is_the_published_one(tuned: Path, tmp_path: Path) -> None:
    """A pair without towers stays greedy."""
    stops = {"bos_token_id": 2, "eos_token_id": [1, 106, 50], "pad_token_id": 0}
    sampler = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
    assert read(tuned / "target" / "generation_config.json") == stops | sampler
    bare = write(tmp_path / "pair", extras=Extras())
    assert read(bare / "target" / "generation_config.json") == stops | {"do_sample": False}
    assert not (bare / "target" / "processor_config.json").exists()


@pytest.mark.parametrize("vocab_size", [4096, 262144])
def test_media_tokens_have_the_ids_of_the_config(vocab_size: int) -> None:
    """Where nano has them, and in a larger vocabulary where they are published; nothing is lost."""
    document = texts.tokenizer_json(vocab_size)
    vocabulary, ids = document["model"]["vocab"], media.token_ids(vocab_size)
    assert sorted(vocabulary.values()) == list(range(vocab_size))
    tokens = {"boi": "<|image>", "eoi": "<image|>", "image": "<|image|>", "video": "<|video|>"}
    tokens |= {"boa": "<|audio>", "eoa": "<audio|>", "audio": "<|audio|>"}
    assert {name: vocabulary[token] for name, token in tokens.items()} == ids
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    assert added.items() <= vocabulary.items()
    assert {tokens[name]: added[tokens[name]] for name in ids} == {tokens[name]: ids[name] for name in ids}
    if vocab_size == published.E2B.target.vocab_size:
        assert ids == {"boi": 255999, "boa": 256000} | {
            name: 258880 + i for i, name in enumerate(("image", "audio", "eoi", "eoa", "video"))
        }


def test_a_tokenizer_knows_the_media_tokens_by_name(tuned: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tuned / "target")
    config = read(tuned / "target" / "config.json")
    assert len(tokenizer) == published.NANO.target.vocab_size
    for name in ("image", "audio", "boi", "eoi", "boa", "eoa"):
        token_id = config[f"{name}_token_id"]
        assert getattr(tokenizer, f"{name}_token_id") == token_id
        assert tokenizer(getattr(tokenizer, f"{name}_token"), add_special_tokens=False).input_ids == [token_id]
    assert tokenizer.convert_tokens_to_ids("<|video|>") == config["video_token_id"]


def video_defaults() -> dict[str, Any]:
    """What the class of transformers says, from its source: it cannot be imported without torchvision."""
    specification = importlib.util.find_spec("transformers.models.gemma4.video_processing_gemma4")
    assert specification is not None
    assert specification.origin is not None
    module = ast.parse(Path(specification.origin).read_text(encoding="utf-8"))
    (kind,) = (n for n in module.body if isinstance(n, ast.ClassDef) and n.name == "Gemma4VideoProcessor")
    assigned = [n for n in kind.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant | ast.List)]
    return {ast.unparse(node.targets[0]): ast.literal_eval(node.value) for node in assigned}


def test_the_processor_has_the_values_of_transformers(tuned: Path) -> None:
    written = read(tuned / "target" / "processor_config.json")
    for kind, part in (
        (Gemma4ImageProcessorPil, "image_processor"),
        (Gemma4AudioFeatureExtractor, "feature_extractor"),
    ):
        assert kind.from_pretrained(tuned / "target").to_dict() == kind().to_dict()
        assert written[part] == json.loads(kind().to_json_string())
    video, theirs = written["video_processor"], video_defaults()
    assert video == video | {name: value for name, value in theirs.items() if name in video}
    assert video.keys() - theirs.keys() == {"video_processor_type", "rescale_factor", "resample"}
    assert theirs.keys() - video.keys() == {"size", "default_to_square", "model_input_names"}


def test_leftovers_are_added_to_the_outer_keys(tuned: Path, tmp_path: Path) -> None:
    clean = write(tmp_path / "pair", extras=dataclasses.replace(TUNED, leftovers=None, adapter_rank=None))
    plain, left = (read(folder / "target" / "config.json") for folder in (clean, tuned))
    keys = {"bos_token_id", "eos_token_id", "model_name", "pad_token_id", "unsloth_fixed", "unsloth_version"}
    assert {key for key in left if key not in plain or left[key] != plain[key]} == keys
    assert left["text_config"] == plain["text_config"]
    assert AutoConfig.from_pretrained(tuned / "target").unsloth_fixed is True
    assert not (clean / "adapter").exists()


def adapted(tensors: Sequence[StoredTensor]) -> dict[str, Names]:
    """The two sides by module."""
    modules: dict[str, Names] = {}
    for tensor in tensors:
        assert tensor.dtype == "F32"
        module, _, side = tensor.name.removeprefix("base_model.model.").rpartition(".lora_")
        modules.setdefault(module, {})[side] = tensor.shape
    return modules


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_adapter_fits_linear_modules_of_transformers(
    name: str, meta: Callable[[str], Gemma4ForConditionalGeneration]
) -> None:
    modules = adapted(finetune.adapter_tensors(whole_target(name, unused_caches=False), 16))
    theirs: Modules = dict(meta(name).named_modules())
    for module, sides in modules.items():
        linear = theirs[module]
        assert isinstance(linear, torch.nn.Linear), module
        assert sides == {"A.weight": (16, linear.in_features), "B.weight": (linear.out_features, 16)}
    target = FULL_SIZE[name].target
    vision = [module for module in modules if module.startswith("model.vision_tower.")]
    assert len(vision) == 7 * towers.PUBLISHED.vision.num_layers
    assert len(modules) - len(vision) == 5 * target.num_layers + 2 * target.num_caches
    assert "model.language_model.layers.0.self_attn.q_proj" in modules
    assert "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear" in modules


def test_peft_puts_the_adapter_on_the_modules_that_its_config_names(tuned: Path) -> None:
    model = load(tuned / "target")
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        before, image = model(ids).logits, soft_tokens(model)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as PEFT warns of missing keys
        peft = PeftModel.from_pretrained(model, tuned / "adapter")
    with safe_open(tuned / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert stored == {name.replace(".default", "") for name, _ in peft.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        assert float((peft(ids).logits - before).abs().max()) > 0.1
        assert float((soft_tokens(peft.base_model.model)[0] - image).abs().max()) > 0.01


def test_an_adapter_without_towers_is_of_text_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "pair", extras=Extras(adapter_rank=2))
    with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
        deltas = [np.linalg.norm(file.get_tensor(name)) for name in names]
    assert names
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    assert min(deltas) > 0


def test_the_command_writes_it_all_and_refuses_in_one_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        options = ("--model", "nano", "--towers", "--output", str(tmp_path / "pair"))
        command = [sys.executable, "-m", "tools.synthesize", *options, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = run("--variant", quantised.MOBILE)
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: how qat-mobile-ct stores")
    assert refused.stderr.count("\n") == 1
    written = run("--leftovers", "unsloth", "--adapter", "--rank", "8")
    assert written.returncode == 0, written.stderr
    assert sorted(path.name for path in (tmp_path / "pair").iterdir()) == ["adapter", "drafter", "target"]
    assert read(tmp_path / "pair" / "adapter" / "adapter_config.json")["r"] == 8
    assert read(tmp_path / "pair" / "target" / "config.json")["unsloth_fixed"] is True
    assert read(tmp_path / "pair" / "target" / "config.json")["vision_config"]["num_hidden_layers"] == 3
