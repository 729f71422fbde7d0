"""Synthesised checkpoints: the published layout, reproducible bytes, values that a model can run on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

from mtp_export.arch import gemma4, published
from mtp_export.arch.spec import FULL, SLIDING
from mtp_export.errors import OutputError
from mtp_export.graph.static import GraphShape, trace_drafter, trace_embedder, trace_target
from mtp_export.source import texts as converter_texts
from mtp_export.source.checkpoint import Checkpoint, read_token_ordering
from mtp_export.weights import mapping
from mtp_export.weights.recipes import RECIPES
from tests.support.gemma4_configs import drafter_config, target_config
from tools.synthesize import layout, texts
from tools.synthesize.__main__ import VARIANTS, Extras, synthesize
from tools.synthesize.layout import StoredTensor
from tools.synthesize.values import BLOCK, Values, on_q4_0_lattice

FLOATS = (PLAIN, LATTICE) = VARIANTS[:2]
FULL_SIZE = {"e2b": published.E2B, "e4b": published.E4B}
Pair = Callable[[str], Path]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Return nano's pair in a variant. Do not change it."""

    def pair(variant: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"synthesised-{variant}"
        if not folder.exists():
            synthesize("nano", folder, variant=variant, depth=Fraction(1), seed=0)
        return folder

    return pair


def shapes(tensors: list[StoredTensor]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in tensors}


def stored_by(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name != "lm_head.weight"}


def file_hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("model", FULL_SIZE)
def test_a_full_size_target_has_the_layout_of_transformers(model: str) -> None:
    """Files of quantisation-aware training leave out what KV-shared layers do not use; the others carry it."""
    spec = FULL_SIZE[model].target
    with torch.device("meta"):
        theirs = stored_by(Gemma4ForCausalLM(Gemma4TextConfig(**target_config(model)["text_config"])))
    theirs = {name.replace("model.", layout.TARGET_PREFIX, 1): shape for name, shape in theirs.items()}
    assert shapes(layout.target_tensors(spec, unused_caches=False)) == theirs
    more = shapes(layout.target_tensors(spec, unused_caches=True))
    assert more.items() > theirs.items()
    own = {name: shape for name, shape in more.items() if name in theirs}
    shared = range(spec.num_caches, spec.num_layers)
    names = [f"layers.{i}.self_attn.{part}.weight" for i in shared for part in ("k_proj", "v_proj", "k_norm")]
    assert more.keys() - own.keys() == {layout.TARGET_PREFIX + name for name in names}
    last = f"{layout.TARGET_PREFIX}layers.{{}}.self_attn.k_proj.weight".format
    assert more[last(spec.num_layers - 1)] == own[last(spec.num_caches - 1)]  # both have full attention


@pytest.mark.parametrize("model", FULL_SIZE)
def test_a_full_size_drafter_has_the_layout_of_transformers(model: str) -> None:
    config = drafter_config(model)
    config["text_config"] = Gemma4TextConfig(**config["text_config"])
    with torch.device("meta"):
        theirs = stored_by(Gemma4AssistantForCausalLM(Gemma4AssistantConfig(**config)))
    tensors = layout.drafter_tensors(FULL_SIZE[model].drafter)
    assert shapes(tensors) == theirs
    assert [t.name for t in tensors if t.dtype == "I64"] == ["masked_embedding.token_ordering"]


@pytest.mark.parametrize("model", FULL_SIZE)
def test_the_configs_are_the_published_ones_without_towers(model: str) -> None:
    pair = FULL_SIZE[model]
    target, drafter = texts.target_config(pair.target), texts.drafter_config(pair.drafter, 131072)
    published = target_config(model)
    assert target["text_config"] == published["text_config"]
    assert {key: published[key] for key in target if not key.endswith("_config")} == {
        key: value for key, value in target.items() if not key.endswith("_config")
    }
    assert drafter == {k: v for k, v in drafter_config(model).items() if k != "transformers_version"}


@pytest.mark.parametrize("model", FULL_SIZE)
def test_an_eighth_of_the_layers_at_full_width(model: str) -> None:
    whole = FULL_SIZE[model].target
    small = layout.at_depth(whole, Fraction(1, 8))
    assert gemma4.read_target_spec(texts.target_config(small), "config.json") == small
    assert {SLIDING, FULL} <= set(small.layer_types[: small.num_caches])
    assert small.num_layers == {"e2b": 4, "e4b": 5}[model]
    assert small.layers[-1].intermediate_size == whole.layers[-1].intermediate_size
    assert {name for name, value in small.values().items() if value != whole.values()[name]} == {
        "layer_types",
        "intermediate_sizes",
        "num_kv_shared_layers",
    }
    assert layout.at_depth(whole, Fraction(1)) == whole
    least = layout.at_depth(whole, Fraction(1, 100))
    assert least.layer_types == (SLIDING, FULL, FULL)
    assert gemma4.read_target_spec(texts.target_config(least), "config.json") == least


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_converter_takes_every_tensor(variant: str, nano: Pair) -> None:
    """Its strict check of configs, names, shapes and dtypes, and its reading of texts."""
    target, drafter = (Checkpoint(nano(variant) / part, part) for part in ("target", "drafter"))
    spec = gemma4.read_target_spec(target.config, "target")
    drafter_spec = gemma4.read_drafter_spec(drafter.config, "drafter")
    assert (spec, drafter_spec) == (published.NANO.target, published.NANO.drafter)
    shape = GraphShape(cache_length=32, num_draft_tokens=1, prefill_lengths=())
    embedders = [trace_embedder(spec, role) for role in ("embedder", "per_layer_embedder")]
    drafter_graph = trace_drafter(drafter_spec, spec, shape, position_offset=1, row_scales=True)
    mapping.target_parameters(target, [trace_target(spec, shape), *embedders], RECIPES["int4"])
    mapping.drafter_parameters(drafter, drafter_graph, drafter_spec, RECIPES["int4"])
    assert set(converter_texts.read_texts(target, spec)) == {"tokenizer", "tokenizer_config", "chat_template"}
    assert converter_texts.stop_token_ids(target, spec) == (1, 106, 50)


def test_tensors_are_typed_and_ordered_like_published_ones(nano: Pair) -> None:
    drafter = Checkpoint(nano(PLAIN) / "drafter", "drafter")
    order = read_token_ordering(drafter, layout.TOKEN_ORDERING, published.NANO.target.vocab_size)
    assert not np.array_equal(order, np.sort(order))
    assert {info.dtype for info in drafter.tensors.values()} == {"BF16", "I64"}
    assert drafter.tensors[layout.TOKEN_ORDERING].dtype == "I64"


def matrices(folder: Path) -> dict[str, NDArray[np.float32]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    return {name: tensor.float().numpy() for name, tensor in tensors.items() if tensor.dim() == 2}


@pytest.mark.parametrize("variant", FLOATS)
@pytest.mark.parametrize("part", ["target", "drafter"])
def test_rows_are_scaled_by_fan_in_and_all_different(variant: str, part: str, nano: Pair) -> None:
    pair = published.NANO
    tensors = layout.drafter_tensors(pair.drafter)
    if part == "target":
        tensors = layout.target_tensors(pair.target, unused_caches=True)
    spread = {tensor.name: tensor.spread for tensor in tensors}
    for name, values in matrices(nano(variant) / part).items():
        assert len(np.unique(values, axis=0)) == len(values), name
        assert 0.9 < values.std() / spread[name] < 1.15, name
        sizes = values.std(1)
        assert np.quantile(sizes, 0.95) / np.quantile(sizes, 0.05) > 1.2, name
        assert abs(values.mean()) < 0.1 * spread[name], name


def llama_cpp_q4_0(row: NDArray[np.float32]) -> NDArray[np.float32]:
    """quantize_row_q4_0_ref and dequantize_row_q4_0 of ggml-quants.c, value by value."""
    out = np.empty_like(row)
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        largest = max(block, key=abs)
        d = largest / np.float32(-8)
        inverse = np.float32(1) / d if d else np.float32(0)
        levels = [min(15, int(x * inverse + np.float32(8.5))) for x in block]
        scale = np.float32(np.float16(d))
        out[start : start + 32] = [np.float32(level - 8) * scale for level in levels]
    return out


def test_the_lattice_is_what_llama_cpp_gives_back_exactly(nano: Pair) -> None:
    for part in ("target", "drafter"):
        for name, values in matrices(nano(LATTICE) / part).items():
            for row in values[:: max(1, len(values) // 8)]:
                np.testing.assert_array_equal(llama_cpp_q4_0(row), row, err_msg=name)
    plain = next(iter(matrices(nano(PLAIN) / "target").values()))[0]
    assert not np.array_equal(llama_cpp_q4_0(plain), plain)


@pytest.mark.parametrize("exponent", range(-10, 1))
def test_the_lattice_is_exact_in_bfloat16_at_every_spread(exponent: int) -> None:
    """Fan-ins of 12288 and less."""
    normals = np.random.default_rng(exponent + 99).standard_normal(4096, dtype=np.float32)
    on_lattice = on_q4_0_lattice(normals * np.float32(2.0**exponent))
    np.testing.assert_array_equal(on_lattice, on_lattice.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(on_lattice, llama_cpp_q4_0(on_lattice))
    error = np.abs(on_lattice - normals * np.float32(2.0**exponent)) * 2.0**-exponent
    assert 0.02 < error.mean() < 0.12


@pytest.mark.parametrize("variant", FLOATS)
def test_the_largest_table_has_a_window_for_every_row(variant: str) -> None:
    """Two values of each row are enough to tell all 262,144 apart, but for chance."""
    values = Values(0, longest_row=BLOCK, lattice=variant == LATTICE)
    table = StoredTensor(name="table.weight", shape=(262144, BLOCK), spread=1.0)
    rows = np.concatenate(list(values.blocks(table))).view(np.uint64)
    assert len(np.unique(rows, axis=0)) == 262144
    with pytest.raises(ValueError, match="rows, and there are"):
        next(values.blocks(dataclasses.replace(table, shape=(2**23 + 1, BLOCK))))


def test_a_seed_gives_the_same_bytes_and_another_seed_others(nano: Pair, tmp_path: Path) -> None:
    """The digest says so across machines and versions of numpy."""
    for name, seed in (("again", 0), ("other", 1)):
        synthesize("nano", tmp_path / name, variant=PLAIN, depth=Fraction(1), seed=seed)
    first, again, other = (file_hashes(f) for f in (nano(PLAIN), tmp_path / "again", tmp_path / "other"))
    assert first == again
    different = {name for name in first if first[name] != other[name]}
    assert different == {"target/model.safetensors", "drafter/model.safetensors"}
    assert first["drafter/model.safetensors"].startswith("45752865f442058b")


def test_shards_hold_the_same_tensors(nano: Pair, tmp_path: Path) -> None:
    synthesize(
        "nano", tmp_path / "pair", variant=PLAIN, depth=Fraction(1), seed=0, extras=Extras(shard_bytes=3_000_000)
    )
    folder = tmp_path / "pair" / "target"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 4
    assert sorted(set(index["weight_map"].values())) == shards
    sharded = {name: folder / shard for name, shard in index["weight_map"].items()}
    assert sharded.keys() == shapes(layout.target_tensors(published.NANO.target, unused_caches=True)).keys()
    size = 0
    with safe_open(nano(PLAIN) / "target" / "model.safetensors", framework="pt") as one_file:
        for name, shard in sharded.items():
            with safe_open(shard, framework="pt") as file:
                tensor = file.get_tensor(name)
            assert torch.equal(tensor, one_file.get_tensor(name)), name
            size += tensor.nbytes
    assert index["metadata"]["total_size"] == size


@pytest.mark.parametrize("variant", FLOATS)
def test_a_forward_pass_is_finite_and_says_many_things(variant: str, nano: Pair) -> None:
    folder = nano(variant) / "target"
    config = Gemma4TextConfig(**json.loads((folder / "config.json").read_text())["text_config"])
    model = Gemma4ForCausalLM(config)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        state = {name.replace(layout.TARGET_PREFIX, "model."): file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    assert not model.load_state_dict(state, strict=False).missing_keys
    model.train(False)
    ids = torch.randint(5, config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits[0]
        again = model(logits.argmax(-1)[None]).logits[0].argmax(-1)
        swapped = model(torch.cat([ids[:, 1:2], ids[:, :1], ids[:, 2:]], 1)).logits[0]
    assert bool(logits.isfinite().all())
    assert 1.0 < float(logits.std()) < 8.0
    best = logits.argmax(-1)
    assert len(best.unique()) > 40
    assert int((again == best).sum()) < 4, "the tied head repeats its own output"
    assert float((logits[-1] - swapped[-1]).abs().max()) > 1e-3, "attention does not see what came before"


def test_the_disk_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr("tools.synthesize.__main__.shutil.disk_usage", lambda path: usage(9_000_000_000))
    with pytest.raises(OutputError, match=r"has 9\.00 GB free and the pair needs 9\.\d\d GB"):
        synthesize("e2b", tmp_path / "pair", variant=PLAIN, depth=Fraction(1), seed=0)
    assert not list(tmp_path.iterdir())


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tools.synthesize", *arguments]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """What SIGKILL leaves, the next run of the same output removes."""
    output = tmp_path / "deep" / "pair"
    output.parent.mkdir()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    big = subprocess.Popen(command("--model", "e2b", "--depth", "1/8", "--output", str(output)), stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not list(output.parent.glob(".pair.partial-*/new/target/*.safetensors")):
        assert time.monotonic() < deadline
        assert big.poll() is None, big.communicate()
        time.sleep(0.01)
    big.send_signal(number)
    big.communicate()
    assert big.returncode != 0
    assert not output.exists()
    if number == signal.SIGKILL:
        subprocess.run(command("--model", "nano", "--output", str(output)), check=True, capture_output=True)
        assert [path.name for path in output.parent.iterdir()] == ["pair"]
    else:
        assert not list(output.parent.iterdir())


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for depth, message in (("2", "2 is not above 0"), ("0", "0 is not above 0"), ("1/0", "'1/0' is not a fraction")):
        done = subprocess.run(
            command("--model", "nano", "--depth", depth, "--output", str(tmp_path / "pair")),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert message in done.stderr
    (tmp_path / "pair").mkdir()
    done = subprocess.run(
        command("--model", "nano", "--output", str(tmp_path / "pair")), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert f"{tmp_path / 'pair'} exists" in done.stderr


def test_it_needs_no_torch(tmp_path: Path) -> None:
    """So its memory is that of numpy."""
    code = (
        "import sys; from fractions import Fraction; from pathlib import Path\n"
        "from tools.synthesize.__main__ import synthesize\n"
        f"synthesize('nano', Path({str(tmp_path / 'pair')!r}), variant='plain', depth=Fraction(1), seed=0)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_tokenizer_has_every_id() -> None:
    tokens = texts.tokenizer_json(262144)["model"]["vocab"]
    assert sorted(tokens.values()) == list(range(262144))
