"""What files say of generation: stop tokens, suppressed tokens and the sampler, as transformers' model has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation import logits_process as library

from mtp_export.arch.gemma4 import read_target_spec
from mtp_export.errors import CheckpointError
from mtp_export.source import texts
from mtp_export.source.checkpoint import Checkpoint
from mtp_runtime.bundle.contract import SamplerDefaults
from mtp_runtime.generate.sampling import Chooser, Sampling, probabilities
from tests.differential.text_folders import SPEC, copied, edit, notes_of

Keys = Mapping[str, Any]
NO_STOP, END_OF_TURN = "no stop token", "<turn|> (106), with which"
# Keys of generation_config.json beside an eos_token_id of 106, and what is reported.
OF_FILE: Mapping[str, tuple[Keys, tuple[str, ...]]] = {
    "published": (
        {"eos_token_id": [1, 106, 50], "do_sample": True, "top_k": 64, "top_p": 0.95, "temperature": 1.0},
        (),
    ),
    "eos aligned by a trainer": ({"eos_token_id": [106, 1]}, ()),
    "eos alone": ({"eos_token_id": 1}, (END_OF_TURN,)),
    "eos twice": ({"eos_token_id": [1, 106, 1]}, ()),
    "eos null": ({"eos_token_id": None}, (NO_STOP,)),
    "eos unset": ({"eos_token_id": -1}, ("eos_token_id -1, which is no token", NO_STOP)),
    "eos of a larger vocabulary": ({"eos_token_id": [106, 4096]}, ("eos_token_id 4096, which is no token",)),
    "no eos listed": ({"eos_token_id": []}, (NO_STOP,)),
    "tokens suppressed": ({"suppress_tokens": [9, 7, 9, -1, 99999]}, ()),
    "no token suppressed": ({"suppress_tokens": []}, ()),
    "defaults of the library": (GenerationConfig._get_default_generation_params(), ()),
    "sampler without drawing": ({"do_sample": False, "temperature": 0.0, "top_k": -1}, ()),
    "drawing without a sampler": ({"do_sample": True}, ()),
    "drawing at a temperature of 0": (
        {"do_sample": True, "temperature": 0.0},
        ("generation_config.json: do_sample = True, where temperature = 0 leaves nothing to draw",),
    ),
    "every token may be drawn": ({"do_sample": True, "top_k": 0, "top_p": 1.0}, ()),
    "repetition penalty": ({"repetition_penalty": 1.2}, ("repetition_penalty = 1.2 where",)),
    "no repeated words": ({"no_repeat_ngram_size": 3}, ("generation_config.json: no_repeat_ngram_size = 3",)),
    "bad words": ({"bad_words_ids": [[5]]}, ("generation_config.json: bad_words_ids = [[5]]",)),
    "beams": ({"num_beams": 4, "length_penalty": 2.0}, ("num_beams = 4",)),
    "lengths": ({"min_new_tokens": 5, "max_length": 512}, ("max_length = 512", "min_new_tokens = 5")),
    "other samplers": ({"min_p": 0.05, "typical_p": 0.9}, ("min_p = 0.05", "typical_p = 0.9")),
    "tokens suppressed at the beginning": ({"begin_suppress_tokens": [5]}, ("begin_suppress_tokens = [5]",)),
    "a key of nobody": ({"chat_format": "gemma"}, ("generation_config.json: chat_format",)),
}
# Without that file: keys of config.json, keys of its text_config, and what is reported.
OF_CONFIG: Mapping[str, tuple[Keys, Keys, tuple[str, ...]]] = {
    "as it is": ({}, {}, ()),
    "eos in the text config alone": ({"eos_token_id": ...}, {}, (END_OF_TURN,)),
    "no eos": ({"eos_token_id": None}, {"eos_token_id": None}, (NO_STOP,)),
    "a sampler in both": ({"do_sample": True, "temperature": 0.3, "top_p": None}, {"top_p": 0.5, "top_k": 3}, ()),
    "tokens suppressed in the text config": ({}, {"suppress_tokens": [7, 8]}, ()),
    "repeated words": ({"no_repeat_ngram_size": 2}, {}, ("config.json: no_repeat_ngram_size = 2",)),
}


@pytest.mark.parametrize("name", OF_FILE)
def test_the_file_is_what_transformers_has(tmp_path: Path, name: str) -> None:
    keys, reported = OF_FILE[name]
    folder = folder_with(tmp_path / "target", {"eos_token_id": 106} | dict(keys), {}, {})
    assert_same(folder)
    assert_reported(folder, reported)


@pytest.mark.parametrize("name", OF_CONFIG)
def test_without_it_config_json_is(tmp_path: Path, name: str) -> None:
    outer, inner, reported = OF_CONFIG[name]
    folder = folder_with(tmp_path / "target", None, outer, inner)
    assert_same(folder)
    assert_reported(folder, reported)


def assert_reported(folder: Path, reported: tuple[str, ...]) -> None:
    notes = notes_of(folder)
    assert len(notes) == len(reported), notes
    assert all(words in note for note, words in zip(notes, reported, strict=True)), notes


def folder_with(folder: Path, of_file: Keys | None, of_config: Keys, of_text: Keys) -> Path:
    copied(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}<turn|>", encoding="utf-8")
    path = folder / "generation_config.json"
    path.unlink()
    if of_file is not None:
        path.write_text(json.dumps(of_file), encoding="utf-8")
    text_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    edit(folder / "config.json", **of_config, text_config=text_config | of_text)
    return folder


def model_config(folder: Path) -> Any:
    """The generation config that a model loaded from the folder has, with the values that `generate` fills in."""
    config: Any
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        config = GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    return config


def assert_same(folder: Path) -> None:
    expected, ours = model_config(folder), texts.generation(Checkpoint(folder, "target"), SPEC)
    stops = expected.eos_token_id if isinstance(expected.eos_token_id, list) else [expected.eos_token_id]
    # An id that no token has never comes.
    assert set(ours.stop_token_ids) == {i for i in stops if i is not None and 0 <= i < SPEC.vocab_size}
    assert set(ours.suppress_tokens) == {i for i in expected.suppress_tokens or [] if 0 <= i < SPEC.vocab_size}
    # The library refuses to generate at a temperature of 0, and says to set do_sample to false.
    assert ours.sampler.do_sample == (expected.do_sample and expected.temperature != 0)
    assert ours.sampler.repetition_penalty == expected.repetition_penalty
    if ours.sampler.do_sample:
        keys = ("temperature", "top_k", "top_p")
        assert [getattr(ours.sampler, key) for key in keys] == [getattr(expected, key) for key in keys]


KEYS = st.fixed_dictionaries(
    {},
    optional={
        "eos_token_id": st.none() | st.integers(-1, 4100) | st.lists(st.integers(-1, 4100), max_size=3),
        "suppress_tokens": st.none() | st.lists(st.integers(-1, 4100), max_size=3),
        "do_sample": st.none() | st.booleans(),
        "temperature": st.none() | st.sampled_from([0.5, 1.0, 2]),
        "top_k": st.none() | st.sampled_from([0, 1, 64]),
        "top_p": st.none() | st.sampled_from([0.5, 1, 1.0]),
        "repetition_penalty": st.none() | st.sampled_from([1.0, 1.5]),
        "pad_token_id": st.none() | st.integers(0, 5),
        "use_cache": st.none() | st.booleans(),
    },
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.none() | KEYS, KEYS, KEYS)
def test_any_combination(
    tmp_path_factory: pytest.TempPathFactory, of_file: Keys | None, of_config: Keys, of_text: Keys
) -> None:
    assert_same(folder_with(tmp_path_factory.mktemp("any") / "target", of_file, of_config, of_text))


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_value_that_the_library_does_not_take(tmp_path: Path, name: str) -> None:
    """The file is named; correcting the value helps."""
    of_file: Keys | None = {"suppress_tokens": ["</s>"]}
    of_config: Keys = {}
    if name == "config.json":
        of_file, of_config = None, {"suppress_tokens": ["</s>"]}
    folder = folder_with(tmp_path / "target", of_file, of_config, {})
    with pytest.raises(CheckpointError, match=rf"{name}: suppress_tokens is \['</s>'\], expected a token id"):
        texts.generation(Checkpoint(folder, "target"), SPEC)
    edit(folder / name, suppress_tokens=[5])
    assert texts.generation(Checkpoint(folder, "target"), SPEC).suppress_tokens == (5,)


@pytest.mark.parametrize("key", ["repetition_penalty", "temperature", "top_p"])
@pytest.mark.parametrize("value", [10**400, -(10**400), 1e30, float("inf"), float("nan"), -1, "1", True, [1.0]])
def test_a_number_that_is_none_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    folder = folder_with(tmp_path / "target", {"do_sample": True, key: value}, {}, {})
    with pytest.raises(
        CheckpointError, match=rf"generation_config\.json: {key} is .*, expected .*: correct it$"
    ) as error:
        texts.generation(Checkpoint(folder, "target"), SPEC)
    assert len(str(error.value)) < 400


def test_a_top_k_beyond_every_vocabulary_keeps_all(tmp_path: Path) -> None:
    """The manifest's numbers have 64 bits."""
    folder = folder_with(tmp_path / "target", {"do_sample": True, "top_k": 10**400}, {}, {})
    assert SPEC.vocab_size < texts.generation(Checkpoint(folder, "target"), SPEC).sampler.top_k < 2**63


@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [-1, [], [-1], 4096, 10**400])
def test_ids_of_config_json_that_are_no_tokens_do_not_matter_beside_the_file(
    tmp_path: Path, key: str, value: Any
) -> None:
    folder = folder_with(tmp_path / "target", {"eos_token_id": 106}, {key: value}, {key: value})
    target = Checkpoint(folder, "target")
    spec = read_target_spec(target.config, "config.json")
    assert (spec.bos_token_id, spec.pad_token_id) == (SPEC.bos_token_id, SPEC.pad_token_id)
    assert spec.eos_token_ids == (() if key == "eos_token_id" else SPEC.eos_token_ids)
    assert texts.stop_token_ids(target, spec) == (106,)


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerDefaults(do_sample=True),
        SamplerDefaults(do_sample=True, temperature=0.6, top_k=4, top_p=0.8, repetition_penalty=1.3),
        SamplerDefaults(do_sample=True, top_k=0, top_p=0.5),
    ],
)
def test_the_probabilities_are_the_librarys(sampler: SamplerDefaults) -> None:
    """Penalty, suppression and what is cut are applied in the library's order."""
    random = np.random.default_rng(0)
    tokens, suppressed = [3, 4, 5, 6], (5, 11)
    for _ in range(20):
        logits = random.normal(0, 2, 40).astype(np.float32)
        sampling = Sampling(
            temperature=sampler.temperature,
            top_k=sampler.top_k or None,
            top_p=sampler.top_p,
            repetition_penalty=sampler.repetition_penalty,
        )
        chooser = Chooser(sampling, None, tokens, suppressed=suppressed)
        chooser.choose((), logits[None])
        actual = probabilities(chooser.scores[0], sampling)
        np.testing.assert_allclose(actual, expected_probabilities(logits, tokens, suppressed, sampler), atol=1e-6)


def expected_probabilities(
    logits: Any, tokens: list[int], suppressed: tuple[int, ...], sampler: SamplerDefaults
) -> Any:
    processors: Any = [
        library.RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty),
        library.SuppressTokensLogitsProcessor(suppressed),
        library.TemperatureLogitsWarper(float(sampler.temperature)),
        *([library.TopKLogitsWarper(sampler.top_k)] if sampler.top_k else []),
        *([library.TopPLogitsWarper(sampler.top_p)] if sampler.top_p < 1 else []),
    ]
    scores = torch.from_numpy(logits)[None].clone()
    for processor in processors:
        scores = processor(torch.tensor([tokens]), scores)
    return scores.softmax(-1)[0].numpy()
