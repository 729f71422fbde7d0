"""Adapters of every kind: what PEFT merges of them into transformers' model is what a checkpoint with them holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtp_export.source.adapters import AdaptedCheckpoint
from tests.differential.adapters import (
    Kind,
    bases,
    check_merged,
    merged_by_peft,
    train,
)

Q = ["q_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EMBED, HEAD = ["embed_tokens"], ["lm_head"]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
)
PREFIX = "base_model.model."


def _of(name: str, base: str = "nano", **options: Any) -> Kind:
    return Kind(name=name, base=base, options={"r": 4} | options)


KINDS = [
    _of("all projections", target_modules=ALL),
    _of("alpha", target_modules=Q, lora_alpha=3, lora_dropout=0.1),
    _of("alpha 0 elsewhere", target_modules=ALL, alpha_pattern={"q_proj": 0, "down_proj": -2}),
    _of("rslora", target_modules=ALL, use_rslora=True),
    _of("all-linear", target_modules="all-linear"),
    _of("default targets"),
    _of("regex of Unsloth", target_modules=UNSLOTH),
    _of("names with their layers", target_modules=["layers.1.self_attn.q_proj", "2.mlp.up_proj"]),
    _of(
        "per-layer modules",
        target_modules=["per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"],
    ),
    _of("rank pattern", target_modules=ALL, rank_pattern={r"layers\.[1-3]\..*q_proj": 2, "down_proj": 6}),
    _of("first pattern wins", target_modules=ALL, alpha_pattern={"0.self_attn.q_proj": 1, "q_proj": 2, "_proj": 5}),
    _of(
        "pattern from the start", target_modules=Q, alpha_pattern={"^model.language_model.layers.0.self_attn.q_proj": 2}
    ),
    _of("pattern of part of a name", target_modules=ALL, alpha_pattern={"proj": 99, "(q|k)_proj": 3}),
    _of("rank and alpha of embeddings", target_modules=[*EMBED, *Q], rank_pattern={"embed_tokens": 2}),
    _of("excluded", target_modules=ALL, exclude_modules=["q_proj", "layers.0.mlp.up_proj"]),
    _of("excluded by a regex", target_modules=ALL, exclude_modules=r".*layers\.[0-4]\..*"),
    _of("layers", target_modules=ALL, layers_to_transform=[0, 3, 9]),
    _of("one layer", target_modules=ALL, layers_to_transform=7, layers_pattern="layers"),
    _of("layers by another pattern", target_modules=Q, layers_to_transform=[1, 2], layers_pattern=["h", "layer[s]"]),
    _of("fan_in_fan_out", target_modules=[*EMBED, *Q], fan_in_fan_out=True),
    _of("bias all", target_modules=Q, bias="all"),
    _of("bias lora_only", target_modules=Q, bias="lora_only"),
    *(
        _of(f"starts {start}", target_modules=ALL, init_lora_weights=start)
        for start in (False, "gaussian", "orthogonal", "mica")
    ),
    _of("starts eva", target_modules=ALL, init_lora_weights="eva", eva_config={}),
    _of("velora", target_modules=Q, velora_config={"num_groups": 4}),
    _of("monteclora", target_modules=Q, monteclora_config={"num_samples": 2}),
    _of("classification", target_modules=Q, task_type="CAUSAL_LM"),
    _of("dora", target_modules=ALL, use_dora=True),
    _of("dora, rslora, patterns", target_modules=ALL, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 7}),
    _of("dora of the embedding", target_modules=[*EMBED, *Q], use_dora=True),
    _of("dora of the per-layer embedding", target_modules=["embed_tokens_per_layer"], use_dora=True),
    _of("dora of the head", target_modules=HEAD, use_dora=True),
    _of("dora of both", target_modules=[*HEAD, *EMBED], use_dora=True),
    _of("dora of both, tying", target_modules=[*HEAD, *EMBED], use_dora=True, ensure_weight_tying=True),
    _of("embedding", target_modules=EMBED),
    _of("embedding, eva", target_modules=EMBED, init_lora_weights="gaussian"),
    _of("per-layer embedding", target_modules=["embed_tokens_per_layer"]),
    _of("head", target_modules=HEAD),
    _of("head and embedding", target_modules=[*HEAD, *EMBED]),
    _of("embedding, tying", target_modules=EMBED, ensure_weight_tying=True),
    _of("head, tying", target_modules=[*HEAD, *Q], ensure_weight_tying=True),
    _of("head by a regex, tying", target_modules=r".*(q_proj|lm_head)", ensure_weight_tying=True),
    _of("tying of nothing", target_modules=Q, ensure_weight_tying=True),
    _of("saved embedding", target_modules=Q, modules_to_save=EMBED),
    _of("saved head", target_modules=Q, modules_to_save=HEAD),
    _of("saved head and embedding", target_modules=Q, modules_to_save=[*EMBED, *HEAD]),
    _of("saved embedding, tying", target_modules=Q, modules_to_save=EMBED, ensure_weight_tying=True),
    _of("saved head, tying", target_modules=Q, modules_to_save=HEAD, ensure_weight_tying=True),
    _of("saved norms", target_modules=Q, modules_to_save=["norm"]),
    _of("saved norm by its name", target_modules=Q, modules_to_save=["model.language_model.norm", "q_norm"]),
    _of("saved MLP", target_modules=ALL, modules_to_save=["mlp"]),
    _of("saved layer", target_modules=ALL, modules_to_save=["layers.3"]),
    _of("saved model", target_modules=HEAD, modules_to_save=["language_model"]),
    _of("saved alone", target_modules="dummy-target-modules", modules_to_save=EMBED),
    _of("embedding, saved head", target_modules=EMBED, modules_to_save=HEAD),
    _of("head, saved embedding", target_modules=HEAD, modules_to_save=EMBED),
    _of("saved of another model", target_modules=Q, modules_to_save=["classifier", "score"]),
    _of("rows", target_modules=Q, trainable_token_indices=[3, 7, 4095]),
    _of("rows of the embedding", target_modules=Q, trainable_token_indices={"embed_tokens": [7, 3]}),
    _of("rows of the head", target_modules=Q, trainable_token_indices={"lm_head": [3, 7]}),
    _of("rows of both", target_modules=Q, trainable_token_indices={"embed_tokens": [3], "lm_head": [3]}),
    _of("other rows of both", target_modules=Q, trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [5, 8]}),
    _of("rows of the per-layer embedding", target_modules=Q, trainable_token_indices={"embed_tokens_per_layer": [1]}),
    _of("rows of the head, embedding", target_modules=EMBED, trainable_token_indices={"lm_head": [3, 7]}),
    _of("rows, tying", target_modules=Q, trainable_token_indices=[3], ensure_weight_tying=True),
]
ON_BASES = [
    _of(f"{name} on {base}", base=base, **options)
    for base in ("untied", "tied, two stored", "tied, two differ", "head alone")
    for name, options in (
        ("head", {"target_modules": HEAD}),
        ("embedding", {"target_modules": [*EMBED, *Q]}),
        ("dora of both", {"target_modules": [*HEAD, *EMBED], "use_dora": True}),
        ("both, tying", {"target_modules": [*HEAD, *EMBED], "ensure_weight_tying": True}),
        ("saved head", {"target_modules": Q, "modules_to_save": HEAD}),
        ("saved embedding, tying", {"target_modules": Q, "modules_to_save": EMBED, "ensure_weight_tying": True}),
        ("rows", {"target_modules": Q, "trainable_token_indices": [3, 7]}),
        ("other rows of both", {"target_modules": Q, "trainable_token_indices": {"lm_head": [1], "embed_tokens": [2]}}),
    )
]
OF_TEXT = [
    _of("text model", base="text", target_modules=ALL),
    _of("text model, dora of all", base="text", target_modules=[*ALL, *EMBED, *HEAD], use_dora=True),
    _of("text model, regex of Unsloth", base="text", target_modules=UNSLOTH),
    _of("text model, layers", base="text", target_modules=ALL, layers_to_transform=[1]),
    _of(
        "text model, saved and rows",
        base="text",
        target_modules=Q,
        modules_to_save=["norm"],
        trainable_token_indices=[5],
    ),
]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("kind", [*KINDS, *ON_BASES, *OF_TEXT], ids=lambda kind: kind.name)
def test_rows_are_what_peft_merges(kind: Kind, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = checkpoints[kind.base]
    adapter = train(tmp_path / "adapter", base, **kind.options)
    if kind.rewrite:
        kind.rewrite(adapter)
    expected = merged_by_peft(base, [adapter])
    if kind.respell:
        kind.respell(adapter)
    check_merged(AdaptedCheckpoint(base, "target", [adapter]), expected)
