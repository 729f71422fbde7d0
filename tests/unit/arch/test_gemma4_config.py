"""config.json: the published ones give the published models, and another model's is named and refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

from mtp_export import pair_graphs
from mtp_export.arch import gemma4, published
from mtp_export.arch.spec import DrafterSpec, LayerType, RopeSpec, TargetSpec
from mtp_export.config import ExportConfig, FormatConfig, GraphConfig, SourceConfig
from mtp_export.errors import CheckpointError
from mtp_export.graph.ir import TracedGraph
from mtp_export.graph.static import GraphShape, trace_drafter, trace_embedder, trace_target
from mtp_export.source.embedded import EMBEDDED
from tests.support.gemma4_configs import F, S, drafter_config, target_config
from tests.support.tiny import Tiny

PUBLISHED = {"e2b": published.E2B, "e4b": published.E4B}
Change = Callable[[dict[str, Any]], object]


def read_target(config: Any) -> TargetSpec:
    return gemma4.read_target_spec(config, "config.json")


def read_drafter(config: Any) -> DrafterSpec:
    return gemma4.read_drafter_spec(config, "config.json")


def refusal(read: Callable[[Any], object], config: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(config)
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_configs_are_the_published_models(model: str) -> None:
    target, drafter = read_target(target_config(model)), read_drafter(drafter_config(model))
    assert target == PUBLISHED[model].target
    assert drafter == PUBLISHED[model].drafter
    gemma4.check_pair(target, drafter)
    gemma4.check_model(model, "target", PUBLISHED[model].target, target)
    gemma4.check_model(model, "drafter", PUBLISHED[model].drafter, drafter)


def test_the_caches_that_the_drafter_reads() -> None:
    assert [published.E2B.target.shared_cache_index(kind) for kind in (S, F)] == [13, 14]
    assert [published.E4B.target.shared_cache_index(kind) for kind in (S, F)] == [22, 23]
    widths = [layer.intermediate_size for layer in published.E2B.target.layers]
    assert widths == [6144] * 15 + [12288] * 20


def test_the_embedded_pair_is_nano() -> None:
    configs = [json.loads((EMBEDDED / part / "config.json").read_text()) for part in ("target", "drafter")]
    assert (read_target(configs[0]), read_drafter(configs[1])) == (published.NANO.target, published.NANO.drafter)


def test_a_text_config_alone_is_a_target() -> None:
    """As transformers saves a Gemma4ForCausalLM."""
    text = target_config("e2b")["text_config"]
    assert read_target(text) == dataclasses.replace(published.E2B.target, eos_token_ids=(1,))


def test_what_transformers_saves_means_what_was_published(tiny_source: Path) -> None:
    """5.22 writes the head size of each full-attention layer in place of global_head_dim."""
    config = json.loads((tiny_source / "target" / "config.json").read_text())
    assert "global_head_dim" not in config
    assert config["per_layer_config"] == {"2": {"head_dim": 32}, "5": {"head_dim": 32}}
    saved = read_target(config)
    assert saved == Tiny().target_spec
    del config["per_layer_config"]
    assert read_target(config | {"global_head_dim": 32}) == saved
    assert read_drafter(json.loads((tiny_source / "drafter" / "config.json").read_text())) == Tiny().drafter_spec


def test_of_two_statements_of_the_head_size_that_by_layer_counts() -> None:
    """As in transformers."""
    config = target_config("e2b")
    overrides = {str(i): {"head_dim": 512} for i in range(4, 35, 5)}
    config["text_config"]["per_layer_config"] = overrides
    config["text_config"]["global_head_dim"] = 256
    assert read_target(config) == published.E2B.target


def text(**changes: Any) -> Change:
    return lambda config: config["text_config"].update(changes)


def without(*path: str) -> Change:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return change


def rope(layer_type: str, **changes: Any) -> Change:
    return lambda config: config["text_config"]["rope_parameters"][layer_type].update(changes)


TARGET_REFUSALS: list[tuple[Change, str]] = [
    (without("text_config"), "text_config is missing"),
    (without("model_type"), "model_type is missing"),
    (without("text_config", "num_kv_shared_layers"), "num_kv_shared_layers is 0, expected 1 to 34"),
    (without("text_config", "rope_parameters", S), "rope_parameters: sliding_attention is missing"),
    (lambda c: c.update(model_type="gemma3"), "model_type is 'gemma3', expected 'gemma4' or 'gemma4_text'"),
    (text(model_type="gemma3_text"), "model_type is 'gemma3_text', expected 'gemma4_text'"),
    (lambda c: c.update(model_type="gemma4_unified"), "this is Gemma 4 12B, and E2B and E4B alone are exported"),
    (text(rope_scaling={"factor": 8.0}), "rope_scaling is {'factor': 8.0}, expected None: no export of rescaled"),
    (rope(F, factor=8.0), "full_attention: factor is 8.0, expected 1.0: no export of rescaled positions"),
    (text(is_causal=None), "is_causal is None, expected True: no export of attention to later tokens"),
    (text(attention_k_eq_v=True), "attention_k_eq_v is True, expected False"),
    (text(attention_bias=True), "attention_bias is True, expected False"),
    (text(attention_bias=0), "attention_bias is 0, expected False"),
    (text(enable_moe_block=True), "enable_moe_block is True, expected False"),
    (text(hidden_activation="silu"), "hidden_activation is 'silu', expected 'gelu_pytorch_tanh'"),
    (text(use_bidirectional_attention="vision"), "use_bidirectional_attention is 'vision', expected None"),
    (rope(F, rope_type="yarn"), "rope_type is 'yarn', expected 'default' or 'proportional'"),
    (rope(S, rope_type="linear"), "rope_type is 'linear', expected 'default' or 'proportional'"),
    (rope(S, rope_theta="fast"), "rope_theta is 'fast', expected a value of type float"),
    (text(hidden_size=True), "hidden_size is True, expected a value of type int"),
    (text(hidden_size=1536.0), "hidden_size is 1536.0, expected a value of type int"),
    (text(hidden_size="1536"), "hidden_size is '1536', expected a value of type int"),
    (text(hidden_size=0), "hidden_size is 0, expected a positive size"),
    (text(hidden_size=-1536), "hidden_size is -1536, expected a positive size"),
    (text(vocab_size=2**31), "vocab_size is 2147483648, expected a positive size"),
    (text(head_dim=10**4000), "head_dim is 1000000"),
    (text(rms_norm_eps=10**400), "expected a finite number"),
    (text(rms_norm_eps=True), "rms_norm_eps is True, expected a value of type float"),
    (text(rms_norm_eps=float("nan")), "rms_norm_eps is nan, expected a finite number"),
    (text(final_logit_softcapping=float("inf")), "final_logit_softcapping is inf, expected a finite number"),
    (text(final_logit_softcapping=None), "final_logit_softcapping is None, expected a value of type float"),
    (text(num_hidden_layers=2**30), "num_hidden_layers is 1073741824, expected at most 1024"),
    (text(num_hidden_layers=34), "layer_types is '35 entries', expected num_hidden_layers = 34"),
    (text(layer_types=[S, "linear_attention"]), "layer_types is 'linear_attention', expected 'sliding_attention' or"),
    (text(layer_types=S), "layer_types is 'sliding_attention', expected a value of type list"),
    (text(layer_types=[[[]]] * 35), "layer_types is [[]], expected"),
    (text(head_dim=255), "head_dim is 255, expected an even size"),
    (text(layer_types=[S] * 35), "num_kv_shared_layers is 20, expected 1 to 34, with both layer types before them"),
    (text(num_kv_shared_layers=35), "num_kv_shared_layers is 35, expected 1 to 34"),
    (text(num_kv_shared_layers=-1), "num_kv_shared_layers is -1, expected 1 to 34"),
    (text(num_kv_shared_layers=31), "num_kv_shared_layers is 31, expected 1 to 34, with both layer types before them"),
    (text(per_layer_config={"4": {"head_dim": 512}}), "per_layer_config is [256, 512], expected one head_dim for all"),
    (text(per_layer_config={"35": {"head_dim": 512}}), "per_layer_config: layer is '35', expected 0 to 34"),
    (
        text(per_layer_config={str(i): {"head_dim": 512 + 2 * (i // 34)} for i in range(4, 35, 5)}),
        "per_layer_config is [512, 514], expected one head_dim for all layers of full_attention",
    ),
    (
        text(per_layer_config={str(i): {"head_dim": 512, "rope_theta": 1.0} for i in range(4, 35, 5)}),
        "per_layer_config: 4: rope_theta is 1.0, expected head_dim alone",
    ),
    (text(bos_token_id=2.0), "bos_token_id is 2.0, expected a token id, or a list of them"),
    (text(pad_token_id=[0, "0"]), "pad_token_id is [0, '0'], expected a token id, or a list of them"),
    (lambda c: c.update(eos_token_id=True), "eos_token_id is True, expected a token id"),
    (lambda c: c.update(eos_token_id="</s>"), "eos_token_id is '</s>', expected a token id"),
    (lambda c: c.update(eos_token_id="y" * 100_000), "eos_token_id is 'yyy"),
]


@pytest.mark.parametrize(("change", "message"), TARGET_REFUSALS, ids=[message[:50] for _, message in TARGET_REFUSALS])
def test_a_target_of_another_kind_is_refused(change: Change, message: str) -> None:
    config = target_config("e2b")
    change(config)
    assert message in refusal(read_target, config)


@pytest.mark.parametrize("value", [-1, 262144, 10**400, [], [-1, 262144]])
def test_ids_that_are_no_tokens_are_none(value: Any) -> None:
    config, defaults = target_config("e2b"), published.E2B.target
    config["text_config"].update(bos_token_id=value, pad_token_id=value)
    config["eos_token_id"] = value
    assert read_target(config) == dataclasses.replace(defaults, eos_token_ids=())
    config["eos_token_id"] = [value, 1] if isinstance(value, int) else [*value, 1]
    assert read_target(config) == dataclasses.replace(defaults, eos_token_ids=(1,))


DRAFTER_REFUSALS: list[tuple[Change, str]] = [
    (lambda c: c.update(model_type="gemma4_unified_assistant"), "model_type is 'gemma4_unified_assistant', expected"),
    (lambda c: c.update(use_ordered_embeddings=False), "use_ordered_embeddings is False, expected true: give the"),
    (lambda c: c.update(num_centroids=2047), "num_centroids is 2047, expected a divisor of vocab_size = 262144"),
    (lambda c: c.update(num_centroids=0), "num_centroids is 0, expected a positive size"),
    (
        lambda c: c.update(centroid_intermediate_top_k=2049),
        "centroid_intermediate_top_k is 2049, expected at most num_centroids = 2048",
    ),
    (without("use_ordered_embeddings"), "use_ordered_embeddings is False, expected true"),
    (text(hidden_size_per_layer_input=256), "hidden_size_per_layer_input is 256, expected 0"),
    (without("text_config", "hidden_size_per_layer_input"), "hidden_size_per_layer_input is 256, expected 0"),
    (text(use_double_wide_mlp=True), "use_double_wide_mlp is True, expected False"),
    (text(num_kv_shared_layers=3), "num_kv_shared_layers is 3, expected 4"),
]


@pytest.mark.parametrize(("change", "message"), DRAFTER_REFUSALS, ids=[message[:50] for _, message in DRAFTER_REFUSALS])
def test_a_drafter_of_another_kind_is_refused(change: Change, message: str) -> None:
    config = drafter_config("e2b")
    change(config)
    assert message in refusal(read_drafter, config)


@pytest.mark.parametrize("config", [[], [{}], "gemma4", 4, None, True], ids=str)
def test_what_is_no_object_is_refused(config: Any) -> None:
    for read in (read_target, read_drafter):
        assert f"config.json: expected an object, got {type(config).__name__}" in refusal(read, config)
        nested = target_config("e2b") if read is read_target else drafter_config("e2b")
        assert "text_config is" in refusal(read, nested | {"text_config": config})


def test_target_and_drafter_may_not_change_places() -> None:
    assert "model_type is 'gemma4_assistant', expected 'gemma4'" in refusal(read_target, drafter_config("e2b"))
    assert "model_type is 'gemma4', expected 'gemma4_assistant'" in refusal(read_drafter, target_config("e2b"))


@pytest.mark.parametrize(
    ("field", "value", "theirs"),
    [
        ("backbone_hidden_size", 2560, "hidden_size is 1536"),
        ("vocab_size", 4096, "the target's is 262144"),
    ],
)
def test_a_drafter_that_does_not_fit_its_target(field: str, value: Any, theirs: str) -> None:
    """Both values are named."""
    drafter = dataclasses.replace(published.E2B.drafter, **{field: value})
    with pytest.raises(CheckpointError, match="the drafter does not fit") as caught:
        gemma4.check_pair(published.E2B.target, drafter)
    assert f"its {field} is {value}, " in str(caught.value)
    assert theirs in str(caught.value)


TURNED = RopeSpec(theta=1e6, partial_rotary_factor=1.0)


@pytest.mark.parametrize(
    ("kinds", "changes", "message"),
    [
        ((S, F), {"num_kv_heads": 2}, "its num_kv_heads is 2, the target's is 1"),
        ((S,), {"head_dim": 128}, "its head_dim is 128, the target's is 256"),
        ((F,), {"head_dim": 256}, "its global_head_dim is 256, the target's is 512"),
        ((S,), {"rope": TURNED}, f"its sliding_rope is {TURNED}, the target's is RopeSpec(theta=10000.0"),
        ((F,), {"rope": TURNED}, f"its full_rope is {TURNED}, the target's is RopeSpec(theta=1000000.0"),
        (
            (S,),
            {"kind": F, "head_dim": 512, "window": None, "rope": published.E2B.drafter.kinds[F].rope},
            "its layer_types are ['full_attention'], expected ['full_attention', 'sliding_attention']",
        ),
    ],
)
def test_a_drafter_whose_layers_do_not_fit_its_target(
    kinds: tuple[LayerType, ...], changes: dict[str, Any], message: str
) -> None:
    layers = published.E2B.drafter.layers
    changed = tuple(dataclasses.replace(layer, **changes) if layer.kind in kinds else layer for layer in layers)
    drafter = dataclasses.replace(published.E2B.drafter, layers=changed)
    with pytest.raises(CheckpointError, match=re.escape(f"the drafter does not fit: {message}")):
        gemma4.check_pair(published.E2B.target, drafter)


def test_the_drafter_of_the_other_model_does_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"backbone_hidden_size is 2560, the target's hidden_size is 1536"):
        gemma4.check_pair(published.E2B.target, published.E4B.drafter)


def test_another_model_than_the_one_named() -> None:
    with pytest.raises(CheckpointError, match=r"the target is e4b, and --model is e2b: give --model e4b"):
        gemma4.check_model("e2b", "target", published.E2B.target, published.E4B.target)
    small = dataclasses.replace(published.E2B.target, hidden_size=1152)
    with pytest.raises(CheckpointError, match=r"has hidden_size = 1152, but e2b has 1536: this is none of nano, e2b"):
        gemma4.check_model("e2b", "target", published.E2B.target, small)
    resized = dataclasses.replace(published.E2B.target, vocab_size=262208)
    with pytest.raises(
        CheckpointError, match=r"vocabulary has 262208 tokens and that of e2b 262144: one of the pair was"
    ):
        gemma4.check_model("e2b", "target", published.E2B.target, resized)
    fine_tuned = dataclasses.replace(published.E2B.target, eos_token_ids=(1,), max_position_embeddings=8192)
    gemma4.check_model("e2b", "target", published.E2B.target, fine_tuned)


@pytest.mark.parametrize(
    ("model", "delegate", "requested", "drafts"),
    [("nano", "cpu", None, 4), ("e2b", "cpu", None, 3), ("e4b", "gpu", None, 3), ("e2b", "gpu", 7, 7)],
)
def test_drafts_of_a_round_by_model_and_processor(
    model: str, delegate: str, requested: int | None, drafts: int
) -> None:
    spec = published.PAIRS[model]
    pair: Any = types.SimpleNamespace(
        model=spec, target_spec=spec.target, drafter_spec=spec.drafter, stop_token_ids=(1,)
    )
    config = ExportConfig(
        source=SourceConfig(model=model),
        output=Path(),
        format=FormatConfig(delegate=delegate),
        graph=GraphConfig(num_draft_tokens=requested),
    )
    assert pair_graphs.graph_shape(config, pair).num_draft_tokens == drafts


def graph_shape() -> GraphShape:
    """A small one: no parameter depends on it."""
    return GraphShape(cache_length=32, num_draft_tokens=1, prefill_lengths=())


def parameters_of(*graphs: TracedGraph) -> dict[str, tuple[int, ...]]:
    return {name: shape for graph in graphs for name, shape in graph.weights.items()}


def stored_by(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint of a transformers model holds: its tied head is not stored."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_full_size_target_has_the_parameters_of_transformers(model: str) -> None:
    """On the meta device, where 5 and 8 billion parameters take no memory."""
    spec = PUBLISHED[model].target
    with torch.device("meta"):
        theirs = Gemma4ForCausalLM(Gemma4TextConfig(**target_config(model)["text_config"]))
    stored = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in stored_by(theirs).items()}
    ours = parameters_of(
        trace_target(spec, graph_shape()),
        trace_embedder(spec, "embedder"),
        trace_embedder(spec, "per_layer_embedder"),
    )
    assert ours == stored
    shared = range(spec.num_caches, spec.num_layers)
    assert not [name for name in ours for i in shared if re.match(rf"layers\.{i}\.self_attn\.[kv]_", name)]


@pytest.mark.parametrize(("model", "count"), [("e2b", 77_731_328), ("e4b", 78_517_760)])
def test_a_full_size_drafter_has_the_parameters_of_transformers(model: str, count: int) -> None:
    pair, config = PUBLISHED[model], drafter_config(model)
    config["text_config"] = Gemma4TextConfig(**config["text_config"])
    with torch.device("meta"):
        theirs = Gemma4AssistantForCausalLM(Gemma4AssistantConfig(**config))
    stored = {name: tuple(tensor.shape) for name, tensor in stored_by(theirs).items()}
    assert len(stored) == 50
    # Parameters are the stored float tensors without the layers' scalars, which transformers counts as buffers.
    scalars = sum(name.endswith("layer_scalar") for name in stored)
    floats = {name: shape for name, shape in stored.items() if name != "masked_embedding.token_ordering"}
    assert sum(math.prod(shape) for shape in floats.values()) - scalars == count
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count

    graph = trace_drafter(pair.drafter, pair.target, graph_shape(), position_offset=1, row_scales=False)
    ours = parameters_of(graph)
    # The embedding goes into the graph as the table of the clustered head, in the order of `token_ordering`.
    head = pair.drafter.head
    assert ours.pop("masked_embedding.token_ordering") == (head.num_centroids, head.cluster_size)
    assert ours.pop("masked_embedding.table") == (head.num_centroids, head.cluster_size * pair.drafter.hidden_size)
    # What no checkpoint has: 0 for the tokens that are never drafted.
    assert ours.pop("masked_embedding.may_draft") == (head.num_centroids, head.cluster_size)
    embedding = {"model.embed_tokens.weight": (262144, 256), "masked_embedding.token_ordering": (262144,)}
    assert ours | embedding == stored


@pytest.mark.parametrize("name", ["e2b", "e4b"])
def test_a_config_that_transformers_saved_is_read(name: str) -> None:
    """transformers 5.22 writes `per_layer_config` with padded layer numbers in place of `global_head_dim`."""
    published = target_config(name)
    saved = json.loads(Gemma4TextConfig(**published["text_config"]).to_json_string())
    assert "per_layer_config" in saved
    assert any(layer.startswith("0") for layer in saved["per_layer_config"]), "no layer number is padded any more"
    expected = gemma4.read_target_spec(published, "published")
    # The text part alone does not know the ids that the whole config adds.
    read = dataclasses.replace(gemma4.read_target_spec(saved, "saved"), eos_token_ids=expected.eos_token_ids)
    assert read == expected
