"""Adapters of every kind: what PEFT merges of them into transformers' model is what a checkpoint with them holds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mtp_export.errors import CheckpointError
from mtp_export.source.adapters import AdaptedCheckpoint
from tests.differential.adapter_kinds import (
    BOTH,
    EMBED,
    HEAD,
    KINDS,
    OF_TEXT,
    ON_BASES,
    RESPELLED,
    REWRITTEN,
    SOME,
    UNSLOTH,
    Q,
)
from tests.differential.adapters import Kind, bases, check_merged, merged_by_peft, train

MODULES = ["q_proj", "k_proj", "o_proj", "up_proj", "per_layer_input_gate", "embed_tokens", "lm_head"]
PATTERNS = ["q_proj", "(q|k)_proj", r"layers\.[0-3]\..*", "embed_tokens", "^lm_head", "head"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("kind", [*KINDS, *ON_BASES, *OF_TEXT, *REWRITTEN, *RESPELLED], ids=lambda kind: kind.name)
def test_rows_are_what_peft_merges(kind: Kind, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = checkpoints[kind.base]
    adapter = train(tmp_path / "adapter", base, **kind.options)
    if kind.rewrite:
        kind.rewrite(adapter)
    expected = merged_by_peft(base, [adapter])
    if kind.respell:
        kind.respell(adapter)
    check_merged(AdaptedCheckpoint(base, "target", [adapter]), expected)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of PEFT's, together as they come."""
    some = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=4, unique=True))
    result: dict[str, Any] = {
        "r": draw(st.sampled_from([1, 4, 6])),
        "lora_alpha": draw(st.sampled_from([1, 8, 0.5])),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "ensure_weight_tying": draw(st.booleans()),
        "target_modules": draw(st.sampled_from([some, "all-linear", "|".join(f".*{name}" for name in some)])),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from([2, 3]), max_size=2)),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from([2, 7.5]), max_size=2)),
        "exclude_modules": draw(st.sampled_from([None, ["up_proj", "layers.1.mlp.down_proj"], r".*\.[0-6]\..*"])),
        "modules_to_save": draw(st.sampled_from([None, EMBED, HEAD, BOTH, ["norm"], ["mlp"]])),
        "trainable_token_indices": draw(st.sampled_from([None, None, [5, 2], {"lm_head": [3]}])),
    }
    if isinstance(result["target_modules"], list):
        result["layers_to_transform"] = draw(st.sampled_from([None, None, [1, 8], 3]))
    return result


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(options=options(), base=st.sampled_from(["nano", "untied", "tied, two differ"]))
def test_options_together(options: dict[str, Any], base: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Where PEFT merges, so do we, or say what PEFT would not merge as it was trained."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    try:
        adapter = train(folder / "adapter", checkpoints[base], **options)
        expected = merged_by_peft(checkpoints[base], [adapter])
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError):  # it refuses them together
        assume(False)
    try:
        merged = AdaptedCheckpoint(checkpoints[base], "target", [adapter])
    except CheckpointError as error:
        if "which PEFT does not merge" not in str(error):
            raise
    else:
        check_merged(merged, expected)


def test_an_adapter_of_the_text_model_is_for_a_multimodal_file_too(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"r": 4, "target_modules": UNSLOTH, "use_dora": True, "modules_to_save": HEAD}
    adapter = train(tmp_path / "adapter", checkpoints["text"], **options)
    expected = merged_by_peft(checkpoints["text"], [adapter])
    check_merged(AdaptedCheckpoint(checkpoints["nano"], "target", [adapter]), expected)


@pytest.mark.parametrize(
    "several",
    [
        ({"target_modules": SOME}, {"target_modules": Q, "use_rslora": True}, {"target_modules": "all-linear"}),
        ({"target_modules": SOME}, {"target_modules": SOME, "use_dora": True}, {"target_modules": Q, "use_dora": True}),
        ({"target_modules": EMBED}, {"target_modules": EMBED, "use_dora": True}, {"target_modules": BOTH}),
        ({"target_modules": Q, "modules_to_save": EMBED}, {"target_modules": BOTH}, {"target_modules": HEAD}),
        ({"target_modules": Q, "modules_to_save": HEAD}, {"target_modules": BOTH, "ensure_weight_tying": True}),
        ({"target_modules": Q, "modules_to_save": HEAD}, {"target_modules": Q, "trainable_token_indices": [3]}),
        ({"target_modules": EMBED}, {"target_modules": Q, "modules_to_save": HEAD, "ensure_weight_tying": True}),
        ({"target_modules": Q, "trainable_token_indices": [3]}, {"target_modules": HEAD, "use_dora": True}),
        ({"target_modules": Q, "modules_to_save": ["norm"]}, {"target_modules": Q, "modules_to_save": [*EMBED, *HEAD]}),
    ],
    ids=[
        "pairs",
        "dora again",
        "tables",
        "saved embedding, pairs of both",
        "saved head, tying",
        "saved head, rows",
        "embedding, saved tying",
        "rows, dora of the head",
        "norms, saved tables",
    ],
)
@pytest.mark.parametrize("base", ["nano", "tied, two differ"])
def test_several_are_merged_one_after_the_other(
    several: Sequence[Mapping[str, Any]], base: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    adapters = [
        train(tmp_path / str(i), checkpoints[base], seed=i, r=2 + i, **options) for i, options in enumerate(several)
    ]
    expected = merged_by_peft(checkpoints[base], adapters)
    check_merged(AdaptedCheckpoint(checkpoints[base], "target", adapters), expected)
