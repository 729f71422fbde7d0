"""Several transformations together, with keys that nobody knows, nulls and defaults: still what transformers loads."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Gemma4Config, Gemma4TextConfig

from tests.differential import test_files, test_leftovers, test_tensors
from tests.differential.oracle import assert_nano, assert_transformers_agrees, exported, nano_pair
from tests.differential.transformation import Suite

# Each list in the order in which a tool would do it: what the weights are, then how they are called, then how they are
# laid out in files. One of each of these at most: two ways of laying out the same thing do not go together.
HEADS = ("tied_head_stored_too", "head_trained_apart_under_a_config_that_says_tied", "head_alone_stored")
DTYPES = ("stored_in_float16", "stored_in_float32", "norms_in_float32_beside_bfloat16")
EXTRAS = (
    "buffers_of_rotary_embeddings",
    "buffer_of_the_embedding_scale",
    "keys_and_values_that_nothing_reads",
    "a_bias_that_the_config_does_not_ask_for",
    "towers_that_the_config_does_not_have",
)
LAYOUTS = ("saved_with_torch_compile", "saved_with_data_parallel", "saved_within_peft_after_merging")
FILES = ("saved_in_shards", "shards_without_an_index", "a_whole_file_beside_a_stale_index")


def changes(suite: Suite, names: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    """One of the names, or none."""
    assert set(names) <= suite.cases.keys()
    return st.lists(st.sampled_from(names), max_size=1)


LEFTOVERS = st.lists(st.sampled_from([*test_leftovers.OUTER, *test_leftovers.TEXT]), max_size=4, unique=True)
VALUES: st.SearchStrategy[Any] = st.sampled_from([None, True, 0, 1.5, "text", [], {"a": [None]}])
UNKNOWN = st.dictionaries(st.from_regex(r"\Ax_[a-z]{1,8}\Z"), VALUES, max_size=4)
NULLS = st.lists(
    st.sampled_from(
        ["eos_token_id", "model_name", "quantization_config", "use_bidirectional_attention", "layer_scale"]
    ),
    unique=True,
)
# Keys of transformers' own, with its defaults, where nano's config leaves them out.
DEFAULTS = {
    field.name: field.default
    for kind in (Gemma4TextConfig, Gemma4Config)
    for field in dataclasses.fields(kind)
    if isinstance(field.default, str | int | float | bool) and field.name not in ("model_type", "vocab_size")
}


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(
    tensors=st.tuples(
        changes(test_tensors.SUITE, HEADS), changes(test_tensors.SUITE, DTYPES), changes(test_tensors.SUITE, EXTRAS)
    ),
    layout=changes(test_tensors.SUITE, LAYOUTS),
    files=changes(test_files.SUITE, FILES),
    leftovers=LEFTOVERS,
    unknown=UNKNOWN,
    nulls=NULLS,
)
def test_any_of_them_together(
    tensors: tuple[list[str], ...],
    layout: list[str],
    files: list[str],
    leftovers: list[str],
    unknown: dict[str, Any],
    nulls: list[str],
) -> None:
    """A folder that transformers does not load for the names of its tensors or files is compared with the same folder
    before that change."""
    with nano_pair() as pair:
        for name in [name for names in tensors for name in names]:
            test_tensors.SUITE.cases[name].change(pair)
        for name in leftovers:
            test_leftovers.SUITE.cases[name.replace(" ", "_")].change(pair)
        pair.config(unknown | dict.fromkeys(nulls))
        pair.text_config(**unknown)
        loaded_run, _ = exported(pair)
        assert_transformers_agrees(loaded_run, pair)
        for suite, name in [(test_tensors.SUITE, n) for n in layout] + [(test_files.SUITE, n) for n in files]:
            suite.cases[name].change(pair)
        run, result = exported(pair)
    assert run.tokens == loaded_run.tokens
    assert (run.logits == loaded_run.logits).all()
    assert (run.draft == loaded_run.draft).all()
    for key in (key for key, value in unknown.items() if value is not None):
        assert any(f"`{key}`" in phrase or "more keys of config.json" in phrase for phrase in result.left_aside)


def test_defaults_written_out(record_property: Any) -> None:
    """Every key that nano's config leaves out, with the value that transformers gives it."""
    with nano_pair() as pair:
        pair.config(lambda config: config["text_config"].update({**DEFAULTS, **config["text_config"]}))
        run, result = exported(pair)
        assert_transformers_agrees(run, pair)
        assert_nano(run)
        assert result.left_aside == ()
    record_property("transformation", "equal")
