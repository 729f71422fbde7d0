"""Adapters that PEFT really made on nano, and what PEFT merges of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtp_export.source.adapters import AdaptedCheckpoint
from mtp_export.source.embedded import EMBEDDED
from mtp_export.source.names import canonical_module

NANO = EMBEDDED / "target"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TRAINED = ("lora_", "modules_to_save", "trainable_tokens_delta")
_CACHED = re.compile(r".*layers\.2\.self_attn\.[kv]_(proj|norm)\.weight").fullmatch
_SIZE = 0.05  # of what training adds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of adapter.

    options: of PEFT's LoraConfig.
    base: the checkpoint that it is trained on and merged into, by name (`bases`).
    rewrite: changes its files before anyone reads them; `respell` afterwards, in ways that only we read.
    """

    name: str
    options: Mapping[str, Any]
    base: str = "nano"
    rewrite: Callable[[Path], None] | None = None
    respell: Callable[[Path], None] | None = None


def bases(folder: Path) -> dict[str, Path]:
    """Write checkpoints that differ from nano in their head, or in their class."""
    tensors = load_file(NANO / "model.safetensors")
    embedding = tensors["model.language_model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)
    other = embedding + 0.05 * torch.randn(embedding.shape, generator=generator).bfloat16()
    alone = {n: t for n, t in tensors.items() if "embed_tokens." not in n}
    unused = {
        n.replace("layers.2.", f"layers.{i}."): t.clone() for i in range(5, 9) for n, t in tensors.items() if _CACHED(n)
    }
    return {
        "nano": NANO,
        "unused": _write(folder / "unused", tensors | unused, ties=True),
        "untied": _write(folder / "untied", tensors | {"lm_head.weight": other}, ties=False),
        "tied, two stored": _write(folder / "two", tensors | {"lm_head.weight": embedding.clone()}, ties=True),
        "tied, two differ": _write(folder / "differ", tensors | {"lm_head.weight": other}, ties=True),
        "head alone": _write(folder / "head", alone | {"lm_head.weight": embedding.clone()}, ties=True),
        "text": _write_text(folder / "text"),
    }


def _write(folder: Path, tensors: Mapping[str, Tensor], *, ties: bool) -> Path:
    folder.mkdir(parents=True)
    config = json.loads((NANO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": ties}))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_text(folder: Path) -> Path:
    whole = base_model(NANO)
    model = transformers.Gemma4ForCausalLM(whole.config.get_text_config())
    model.load_state_dict({n.replace("language_model.", ""): t for n, t in whole.state_dict().items()})
    model.save_pretrained(folder)
    return folder


def base_model(folder: Path) -> Any:
    """transformers' model of a checkpoint, a new one each time."""
    return copy.deepcopy(_base_model(folder))


@functools.lru_cache(maxsize=8)
def _base_model(folder: Path) -> Any:
    library: Any = transformers  # only half of what is used here is typed
    library.utils.logging.set_verbosity_error()
    return library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(folder: Path, base: Path | Any, seed: int = 0, **options: Any) -> Path:
    """Write an adapter that PEFT made, with random values where training would have put others."""
    model = base_model(base) if isinstance(base, Path) else base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LoraConfig(**copy.deepcopy(options)))  # it changes lists
        change(tuned, seed)
        tuned.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def change(tuned: Any, seed: int = 0) -> None:
    """Give an adapter random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "magnitude" in name:
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
        elif any(part in name for part in _TRAINED):
            parameter.add_(_SIZE * torch.randn(parameter.shape, generator=generator))


def merged_by_peft(base: Path, adapters: Sequence[Path]) -> dict[str, Tensor]:
    """The text model's tensors after merging adapters one after the other, by canonical name."""
    model = base_model(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    tensors = {canonical_module(name): tensor for name, tensor in model.state_dict().items()}
    if model.lm_head.weight is model.get_input_embeddings().weight:
        del tensors["lm_head.weight"]
    return tensors


def check_merged(checkpoint: AdaptedCheckpoint, expected: Mapping[str, Tensor]) -> None:
    """Compare each tensor in two blocks, and some rows in another order."""
    before = {canonical_module(name): tensor for name, tensor in _base_model(checkpoint.folder).state_dict().items()}
    assert checkpoint.tied == ("lm_head.weight" not in expected)
    if checkpoint.embedding in checkpoint.adapted:
        assert len(checkpoint.tables) == (1 if checkpoint.tied else 2)
    for name, tensor in expected.items():
        ours, rows = checkpoint.embedding if name == "embed_tokens.weight" else name, len(tensor)
        if ours not in checkpoint.adapted:
            assert torch.equal(tensor, before[name]), name
            assert np.array_equal(checkpoint.rows(ours, 0, rows), tensor.numpy()), name
            continue
        blocks = [checkpoint.rows(ours, start, stop) for start, stop in ((0, rows // 3), (rows // 3, rows))]
        _close(name, np.concatenate(blocks), tensor)
        some = np.random.default_rng(0).permutation(rows)[:50]
        _close(name, checkpoint.rows_at(ours, some), tensor[torch.from_numpy(some)])
    changed = {name for name, tensor in expected.items() if not torch.equal(tensor, before[name])}
    assert changed, "the adapter changes nothing"
    tables = {"lm_head.weight", "embed_tokens.weight"}
    assert expected.keys() - tables == checkpoint.tensors.keys() & before.keys() - tables


def _close(name: str, ours: Any, theirs: Tensor) -> None:
    """Within 1e-6 of the length of a row: PEFT sums the lengths of DoRA in float32."""
    lengths = theirs.reshape(len(theirs), -1).norm(dim=1).clamp(min=1).numpy()
    differences = np.abs(ours - theirs.numpy()).reshape(len(theirs), -1).max(axis=1) / lengths
    assert ours.shape == theirs.shape
    assert differences.max() <= 1e-6, f"{name} differs by {differences.max()}"


def rewritten_tensors(names: Callable[[str], str]) -> Callable[[Path], None]:
    """Return what gives the tensors of an adapter other names."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({names(name): tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return rewrite


def changed_tensors(function: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        function(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return rewrite


def changed_config(**values: Any) -> Callable[[Path], None]:
    """Return what changes keys of adapter_config.json; `...` takes one out."""

    def rewrite(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | values
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return rewrite
