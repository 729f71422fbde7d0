"""The kinds of adapters that are compared with PEFT: made with it, and rewritten as tools do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.differential.adapters import Kind, changed_config, changed_tensors, rewritten_tensors

Q = ["q_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]
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


def _re(name: str, rewrite: Callable[[Path], None], base: str = "nano", **options: Any) -> Kind:
    return dataclasses.replace(_of(name, base, **options), rewrite=rewrite)


def _sp(name: str, respell: Callable[[Path], None], **options: Any) -> Kind:
    return dataclasses.replace(_of(name, **options), respell=respell)


KINDS = [
    _of("all projections", target_modules=ALL),
    _of("alpha", target_modules=Q, lora_alpha=3, lora_dropout=0.1),
    _of("alpha 0 elsewhere", target_modules=ALL, alpha_pattern={"q_proj": 0, "down_proj": -2}),
    _of("rslora", target_modules=SOME, use_rslora=True),
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
    _of("excluded by a regex", target_modules=SOME, exclude_modules=r".*layers\.[0-4]\..*"),
    _of("layers", target_modules=SOME, layers_to_transform=[0, 3, 9]),
    _of("one layer", target_modules=ALL, layers_to_transform=7, layers_pattern="layers"),
    _of("layers by another pattern", target_modules=Q, layers_to_transform=[1, 2], layers_pattern=["h", "layer[s]"]),
    _of("fan_in_fan_out", target_modules=[*EMBED, *Q], fan_in_fan_out=True),
    _of("bias all", target_modules=Q, bias="all"),
    _of("bias lora_only", target_modules=Q, bias="lora_only"),
    *(
        _of(f"starts {start}", target_modules=Q, init_lora_weights=start)
        for start in (False, "gaussian", "orthogonal", "mica")
    ),
    _of("starts eva", target_modules=SOME, init_lora_weights="eva", eva_config={}),
    _of("velora", target_modules=Q, velora_config={"num_groups": 4}),
    _of("monteclora", target_modules=Q, monteclora_config={"num_samples": 2}),
    _of("classification", target_modules=Q, task_type="CAUSAL_LM"),
    _of("dora", target_modules=SOME, use_dora=True),
    _of("dora, rslora, patterns", target_modules=ALL, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 7}),
    _of("dora of the embedding", target_modules=[*EMBED, *Q], use_dora=True),
    _of("dora of the per-layer embedding", target_modules=["embed_tokens_per_layer"], use_dora=True),
    _of("dora of the head", target_modules=HEAD, use_dora=True),
    _of("dora of both", target_modules=[*HEAD, *EMBED], use_dora=True),
    _of("dora of both, tying", target_modules=[*HEAD, *EMBED], use_dora=True, ensure_weight_tying=True),
    _of("embedding", target_modules=EMBED),
    _of("embedding, gaussian", target_modules=EMBED, init_lora_weights="gaussian"),
    _of("per-layer embedding", target_modules=["embed_tokens_per_layer"]),
    _of("head", target_modules=HEAD),
    _of("head and embedding", target_modules=[*HEAD, *EMBED]),
    _of("embedding, tying", target_modules=EMBED, ensure_weight_tying=True),
    _of(
        "rank of the embedding, tying", target_modules=EMBED, ensure_weight_tying=True, rank_pattern={"embed_tokens": 2}
    ),
    _of("head, tying", target_modules=[*HEAD, *Q], ensure_weight_tying=True),
    _of("head by a regex, tying", target_modules=r".*(q_proj|lm_head)", ensure_weight_tying=True),
    _of("embedding by a regex, tying", target_modules=r".*embed_tokens", ensure_weight_tying=True),
    _of("tying of nothing", target_modules=Q, ensure_weight_tying=True),
    _of("saved embedding", target_modules=Q, modules_to_save=EMBED),
    _of("saved head", target_modules=Q, modules_to_save=HEAD),
    _of("saved head and embedding", target_modules=Q, modules_to_save=[*EMBED, *HEAD]),
    _of("saved embedding, tying", target_modules=Q, modules_to_save=EMBED, ensure_weight_tying=True),
    _of("saved head, tying", target_modules=Q, modules_to_save=HEAD, ensure_weight_tying=True),
    _of("saved norms", target_modules=Q, modules_to_save=["norm"]),
    _of("saved norm by its name", target_modules=Q, modules_to_save=["model.language_model.norm", "q_norm"]),
    _of("saved by the end of a name", target_modules=Q, modules_to_save=["tokens"]),
    _of("saved MLP", target_modules=SOME, modules_to_save=["mlp"]),
    _of("saved layer", target_modules=SOME, modules_to_save=["layers.3"]),
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
    for base, most in (("untied", 8), ("tied, two differ", 8), ("tied, two stored", 4), ("head alone", 5))
    for name, options in (
        ("head", {"target_modules": HEAD}),
        ("embedding", {"target_modules": [*EMBED, *Q]}),
        ("dora of both", {"target_modules": [*HEAD, *EMBED], "use_dora": True}),
        ("both, tying", {"target_modules": [*HEAD, *EMBED], "ensure_weight_tying": True}),
        ("saved head", {"target_modules": Q, "modules_to_save": HEAD}),
        ("saved embedding, tying", {"target_modules": Q, "modules_to_save": EMBED, "ensure_weight_tying": True}),
        ("rows", {"target_modules": Q, "trainable_token_indices": [3, 7]}),
        ("other rows of both", {"target_modules": Q, "trainable_token_indices": {"lm_head": [1], "embed_tokens": [2]}}),
    )[:most]
]
OF_TEXT = [
    _of("text model", base="text", target_modules=ALL),
    _of("text model, dora of all", base="text", target_modules=[*ALL, *EMBED, *HEAD], use_dora=True),
    _of("text model, regex of Unsloth", base="text", target_modules=UNSLOTH),
    _of("text model, layers", base="text", target_modules=SOME, layers_to_transform=[1]),
    _of(
        "text model, saved and rows",
        base="text",
        target_modules=Q,
        modules_to_save=["norm"],
        trainable_token_indices=[5],
    ),
]


def _kept(*parts: str) -> Callable[[Path], None]:
    """Keep the tensors of an adapter that have one of these in their names."""
    return changed_tensors(lambda t: [t.pop(name) for name in list(t) if not any(part in name for part in parts)])


def _cast(dtype: torch.dtype) -> Callable[[Path], None]:
    return changed_tensors(lambda t: t.update({name: value.to(dtype) for name, value in t.items()}))


def _scaled(part: str) -> Callable[[Path], None]:
    return changed_tensors(lambda t: t.update({name: 3 * value for name, value in t.items() if part in name}))


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def _whole(name: str, *shape: int) -> Callable[[Path], None]:
    """Return what adds a parameter to an adapter's tensors, whole."""
    return changed_tensors(lambda t: t.update({name: _normal(*shape)}))


def _with_infix(name: str) -> str:
    """The name that a parameter has in PEFT's model, whose adapter is called `default`."""
    stem, _, last = name.rpartition(".")
    if last == "lora_magnitude_vector":
        return f"{name}.default.weight"
    return f"{stem}.default.weight" if last == "weight" else f"{name}.default"


TEXT = f"{PREFIX}model.language_model."
LAYER_7 = {
    f"{TEXT}layers.7.self_attn.{p}.lora_{s}.weight": _normal(*d)
    for p, s, d in (
        ("k_proj", "A", (4, 256)),
        ("k_proj", "B", (64, 4)),
        ("v_proj", "A", (4, 256)),
        ("v_proj", "B", (64, 4)),
    )
}
TOWERS = {
    f"{PREFIX}model.{m}.lora_{s}.weight": _normal(4, 4)
    for s in "AB"
    for m in (
        "vision_tower.encoder.layers.0.self_attn.q_proj.linear",
        "audio_tower.layers.0.self_attn.q_proj.linear",
        "embed_vision.embedding_projection",
    )
}
BOTH = [*HEAD, *EMBED]

# Files as other tools, and other versions of PEFT, write them: what PEFT reads in them, we read.
REWRITTEN = [
    _re("names with `default`", rewritten_tensors(_with_infix), target_modules=ALL),
    _re("names with `default`, dora", rewritten_tensors(_with_infix), target_modules=SOME, use_dora=True),
    _re(
        "lengths with `weight`",
        rewritten_tensors(lambda n: n.replace("magnitude_vector", "magnitude_vector.weight")),
        target_modules=Q,
        use_dora=True,
    ),
    _re("bfloat16", _cast(torch.bfloat16), target_modules=[*Q, *EMBED], use_dora=True, modules_to_save=["norm"]),
    _re("float16", _cast(torch.float16), target_modules=Q, trainable_token_indices=[3]),
    _re("float64", _cast(torch.float64), target_modules=Q),
    _re(
        "PEFT's defaults", changed_config(r=..., lora_alpha=..., bias=..., init_lora_weights=...), target_modules=Q, r=8
    ),
    _re("unknown keys", changed_config(foo=1, unsloth={"a": 1}), target_modules=Q),
    _re("settings of other starts", changed_config(loftq_config={"loftq_bits": 4}, corda_config={}), target_modules=Q),
    _re("a classifier's", changed_config(task_type="SEQ_CLS"), target_modules=Q),
    _re("targets that leave pairs out", changed_config(target_modules=["q_proj", "up_proj"]), target_modules=ALL),
    _re("layers that leave pairs out", changed_config(layers_to_transform=[2]), target_modules=SOME),
    _re("exclusion that leaves pairs out", changed_config(exclude_modules=r".*[37]\..*"), target_modules=SOME),
    _re("all-linear leaves the head out", changed_config(target_modules="all-linear"), target_modules=[*HEAD, *Q]),
    _re("pairs of some modules", _kept("layers.3", "layers.8"), target_modules=SOME),
    _re("lengths that are not used", changed_config(use_dora=False), target_modules=Q, use_dora=True),
    _re("pairs of towers", changed_tensors(lambda t: t.update(TOWERS)), target_modules=SOME),
    _re("pairs of KV-sharing layers", changed_tensors(lambda t: t.update(LAYER_7)), target_modules=SOME),
    _of("random start beside unused", base="unused", target_modules=["k_proj"], init_lora_weights=False),
    _re("the same, the base too", changed_tensors(lambda t: t.update(LAYER_7)), base="unused", target_modules=SOME),
    _re("whole norm", _whole(f"{TEXT}norm.weight", 256), target_modules=Q),
    _re("whole scalar", _whole(f"{TEXT}layers.2.layer_scalar", 1), target_modules=Q),
    _re("whole head", _whole(f"{PREFIX}lm_head.weight", 4096, 256), target_modules=Q),
    _re(
        "whole head, untied",
        _whole(f"{PREFIX}lm_head.weight", 4096, 256),
        base="untied",
        target_modules=Q,
    ),
    _re(
        "whole head and embedding",
        changed_tensors(
            lambda t: t.update(
                {f"{PREFIX}lm_head.weight": _normal(4096, 256), f"{TEXT}embed_tokens.weight": _normal(4096, 256) * 2}
            )
        ),
        target_modules=Q,
    ),
    _re("whole matrix beside its pair", _whole(f"{TEXT}layers.0.self_attn.q_proj.weight", 256, 256), target_modules=Q),
    _re(
        "whole matrix inside its pair",
        _whole(f"{TEXT}layers.0.self_attn.q_proj.base_layer.weight", 256, 256),
        target_modules=Q,
        use_dora=True,
    ),
    _re("embedding with another below", _scaled("base_layer"), target_modules=EMBED),
    _re(
        "embedding with none below",
        changed_tensors(lambda t: t.pop(f"{TEXT}embed_tokens.base_layer.weight")),
        target_modules=EMBED,
    ),
    _re("head with another below", _scaled("base_layer"), target_modules=HEAD, base="untied"),
    _re(
        "rows with another table below",
        changed_tensors(
            lambda t: t.update({f"{TEXT}embed_tokens.token_adapter.base_layer.weight": _normal(4096, 256)})
        ),
        target_modules=Q,
        trainable_token_indices=[3, 9],
    ),
    _re("tied, with the embedding's pair alone", _kept("embed_tokens"), target_modules=BOTH, ensure_weight_tying=True),
    _re("tied, with the head's pair alone", _kept("lm_head"), target_modules=BOTH, ensure_weight_tying=True),
    _re("tied, with two pairs", _scaled("lm_head.lora_B"), target_modules=BOTH, ensure_weight_tying=True),
    _re("tied, with two saved", _scaled("lm_head"), target_modules=Q, modules_to_save=HEAD, ensure_weight_tying=True),
    _re(
        "biases",
        _whole(f"{TEXT}layers.0.self_attn.q_proj.bias", 256),
        target_modules=Q,
    ),
]
# Spellings that PEFT does not read, and that say no less.
RESPELLED = [
    _sp("nulls", changed_config(rank_pattern=None, alpha_pattern=None, bias=None, use_dora=None), target_modules=Q),
    _sp(
        "lengths of older versions",
        rewritten_tensors(lambda n: n.replace("magnitude_vector", "magnitude_vector.default")),
        target_modules=Q,
        use_dora=True,
    ),
    _sp("names without a prefix", rewritten_tensors(lambda n: n.removeprefix(PREFIX)), target_modules=SOME),
    _sp("names of the text model", rewritten_tensors(lambda n: n.replace("language_model.", "")), target_modules=ALL),
    _sp(
        "names of the bare text model",
        rewritten_tensors(lambda n: n.replace("model.language_model.", "")),
        target_modules=[*ALL, *EMBED],
        modules_to_save=["norm"],
    ),
    _sp(
        "names of older classes",
        rewritten_tensors(lambda n: n.replace("model.language_model.", "language_model.model.")),
        target_modules=r"model\.language_model\..*_proj",
    ),
    _sp(
        "saved with `modules_to_save`",
        rewritten_tensors(lambda n: n.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")),
        target_modules=Q,
        modules_to_save=HEAD,
    ),
]
