"""Suppressed tokens never come out, and what may be said keeps its distribution; a session's sampling and special
tokens are its manifest's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mtp_runtime import Bundle, Session
from mtp_runtime.backends.litert.static import StaticBackend
from mtp_runtime.bundle.contract import Manifest, SamplerDefaults
from mtp_runtime.errors import UserError
from mtp_runtime.generate.sampling import Chooser, Method, Sampling
from tests.support.fake_backend import FakeBackend, fake_manifest
from tests.support.talking import write_texts
from tests.unit.runtime.test_sampling import TABLES, against_the_target, transitions

SUPPRESSED = (2, 5)


@pytest.mark.many_cases
@pytest.mark.parametrize("method", ["match", "speculative"])
@pytest.mark.parametrize("drafts", [0, 3])
def test_tokens_that_are_not_suppressed_keep_their_distribution(method: Method, drafts: int) -> None:
    sampling = Sampling(temperature=0.8, top_k=5, top_p=0.95, seed=4, method=method)
    tokens, stats = TABLES.generate(sampling, drafts=drafts, count=20_000, suppressed=SUPPRESSED)
    assert not {token.id for token in tokens} & set(SUPPRESSED)
    assert against_the_target(transitions(tokens), TABLES.expected(sampling, SUPPRESSED)) > 1e-3
    assert bool(stats.accepted) == bool(drafts)


def test_greedy_output_does_not_depend_on_drafts() -> None:
    outputs = [TABLES.generate(None, drafts=k, count=60, suppressed=SUPPRESSED)[0] for k in (0, 1, 3)]
    assert len({tuple(token.id for token in tokens) for tokens in outputs}) == 1
    assert outputs[0] != TABLES.generate(None, drafts=0, count=60)[0]


def test_a_proposed_one_is_refused() -> None:
    chooser = Chooser(None, None, (1,), suppressed=(2,))
    rows = np.array([[0.0, 1.0, 9.0], [5.0, 0.0, 0.0]], np.float32)
    assert chooser.choose((2,), rows) == (0, 1, "correction")
    assert rows[0, 2] == 9.0  # the backend's own array stays as it is


def test_a_constraint_cannot_allow_one() -> None:
    def only(*tokens: int) -> Any:
        return lambda output: np.isin(np.arange(3), tokens)

    rows = np.array([[0.0, 1.0, 9.0]], np.float32)
    assert Chooser(None, only(0, 2), (1,), suppressed=(2,)).choose((), rows) == (0, 0, "plain")
    with pytest.raises(UserError, match="the constraint allows no token after 0"):
        Chooser(None, only(2), (1,), suppressed=(2,)).choose((), rows)


def test_not_even_after_a_stop_token() -> None:
    chooser = Chooser(None, None, (1,), frozenset({0}), suppressed=(2,))
    assert chooser.choose((0, 2), np.array([[9, 0, 0], [0, 1, 9], [0, 0, 9]], np.float32)) == (1, 1, "correction")


def opened(folder: Path, **changes: Any) -> Session:
    plain = fake_manifest()
    manifest = msgspec.structs.replace(plain, files={**plain.files, **write_texts(folder, plain.vocab_size)}, **changes)
    manifest = Manifest.from_json(manifest.to_json())
    return Session(
        Bundle(manifest, folder, None), StaticBackend(FakeBackend(manifest, lambda position: True), manifest)
    )


def test_the_checkpoints_sampling(tmp_path: Path) -> None:
    sampler = SamplerDefaults(do_sample=True, temperature=0.7, top_k=0, top_p=0.9, repetition_penalty=1.2)
    with opened(tmp_path, sampler=sampler) as session:
        expected = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=3, method="speculative")
        assert session.checkpoint_sampling(seed=3, method="speculative") == expected
        drawn = session.generate((2, 9), max_new_tokens=8, sampling="checkpoint").finish().tokens
        assert (
            drawn == session.generate((2, 9), max_new_tokens=8, sampling=session.checkpoint_sampling()).finish().tokens
        )


def test_without_do_sample_it_is_greedy(tmp_path: Path) -> None:
    with opened(tmp_path, sampler=SamplerDefaults(repetition_penalty=1.2)) as session:
        assert session.checkpoint_sampling() == Sampling(temperature=0.0, top_k=50, repetition_penalty=1.2)


def test_a_bundle_of_an_older_version_says_so(tmp_path: Path) -> None:
    with opened(tmp_path) as session:
        with pytest.raises(UserError, match=r"without the checkpoint's sampling: export it again, or give a Sampling"):
            session.generate((2, 9), sampling="checkpoint")
        assert session.chat_prompt("ab").startswith("<bos><|turn>u")


def test_a_template_gets_the_manifests_special_tokens(tmp_path: Path) -> None:
    with opened(tmp_path, special_tokens={"bos_token": "<unk>", "eos_token": "<eos>", "messages": "no"}) as session:
        (tmp_path / "chat_template").write_text(
            "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ messages[0].content }}"
        )
        assert session.chat_prompt("ab") == "<unk><eos>ab"
        assert session.chat_prompt("ab", bos_token="", pad_token="<pad>") == "<eos><pad>ab"


def test_a_checkpoint_without_a_bos_has_none_in_its_prompts(tmp_path: Path) -> None:
    with opened(tmp_path, special_tokens={}) as session:
        assert session.chat_prompt("ab").startswith("<|turn>u")
