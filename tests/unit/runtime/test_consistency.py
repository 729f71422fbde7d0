"""A manifest that contradicts itself is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from mtp_runtime import BundleError, Manifest
from mtp_runtime.bundle.consistency import check_consistency
from tests.support.fake_backend import fake_manifest

Document = dict[str, Any]


def test_a_good_manifest_is_consistent() -> None:
    check_consistency(fake_manifest())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 17}, "embeddings is ('float32', (1, 8, 16)), expected ('float32', (1, 8, 17))"),
        ({"vocab_size": 51}, "logits is ('float32', (1, 1, 50)), expected ('float32', (1, 1, 51))"),
        ({"num_draft_tokens": 3, "context_length": 61}, "target verify takes 5 tokens, expected 4"),
        ({"cache_length": 65, "context_length": 61}, "no decode signature over the whole cache of 65"),
        ({"bos_token_id": 50}, "outside the vocabulary of 50"),
        ({"stop_token_ids": (-1,)}, "outside the vocabulary of 50"),
    ],
)
def test_a_size_that_contradicts_a_signature_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError) as caught:
        check_consistency(msgspec.structs.replace(fake_manifest(), **changes))
    assert message in str(caught.value)


def edit_signature(edit: Callable[[Document], None], role: str = "target", name: str = "decode") -> Manifest:
    """Return a good manifest with one signature changed by `edit`."""
    document = json.loads(fake_manifest().to_json())
    edit(next(spec for spec in document["signatures"][role] if spec["name"] == name))
    return Manifest.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda spec: spec.update(kind="draft"), "of kind draft, expected prefill or decode or verify"),
        (lambda spec: spec.update(name="verify"), "two signatures of one name"),
        (lambda spec: spec.update(num_tokens=2), "target decode takes 2 tokens, expected 1"),
        (lambda spec: spec.update(attention_length=63), "no decode signature over the whole cache"),
        (lambda spec: spec["inputs"].pop(), "the target's decode has no KV caches"),
        (lambda spec: spec["inputs"].pop(0), "embeddings is absent, expected ('float32', (1, 1, 16))"),
        (lambda spec: spec["inputs"].append(spec["inputs"][0]), "two inputs of one name"),
        (lambda spec: spec["inputs"][4].update(shape=[1, 1, 63, 1]), "expected (1, G, 64, D)"),
        (lambda spec: spec["inputs"][4].update(name="kv_cache_../x"), "'kv_cache_../x' is no name of a KV cache"),
        (lambda spec: spec["inputs"][4].update(name="kv_cache_k_0.1"), "kv_cache_k_0.1 is"),
        (lambda spec: spec["inputs"][2].update(dtype="float32"), "input_pos is ('float32', (1,))"),
        (lambda spec: spec["outputs"].pop(), "activations is absent"),
    ],
)
def test_a_signature_of_other_tensors_is_refused(edit: Callable[[Document], None], message: str) -> None:
    with pytest.raises(BundleError) as caught:
        check_consistency(edit_signature(edit))
    assert message in str(caught.value)


def test_a_variant_may_not_read_beyond_the_cache() -> None:
    with pytest.raises(BundleError, match="draft_16 reads 65 of 64 cache positions"):
        check_consistency(edit_signature(lambda spec: spec.update(attention_length=65), "drafter", "draft_16"))
