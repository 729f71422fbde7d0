"""The manifest: what is written is what is read, and a bad one is refused in one line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mtp_runtime.bundle.contract import (
    FORMAT_VERSION,
    CacheName,
    FileEntry,
    Manifest,
    TensorSpec,
    cache_of_output,
    of_sequence,
    output_name,
    read_manifest,
)
from mtp_runtime.errors import BundleError
from tests.support.fake_backend import fake_manifest

MANIFEST = fake_manifest()


def document(**changes: Any) -> str:
    """Return the JSON of a good manifest with some top-level fields replaced; `None` removes one."""
    fields: dict[str, Any] = {**json.loads(MANIFEST.to_json()), **changes}
    return json.dumps({key: value for key, value in fields.items() if value is not None})


def refusal(text: str) -> str:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_manifest_survives_its_json() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


def test_the_json_does_not_depend_on_the_order_of_fields() -> None:
    shuffled = msgspec.structs.replace(MANIFEST, files=dict(reversed(list(MANIFEST.files.items()))))
    assert shuffled.to_json() == MANIFEST.to_json()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "upgrade mtp-export"),
        ({"format_version": FORMAT_VERSION + 1, "signatures": "of another shape"}, "upgrade mtp-export"),
        ({"format_version": 0}, "format_version is 0, expected 1"),
        ({"model": None}, "missing required field `model`"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"cache_length": "long"}, "not a valid manifest"),
        ({"context_length": 63}, "context_length is 63, expected cache_length - num_draft_tokens = 60"),
        ({"num_draft_tokens": 0}, "sizes must be positive"),
        ({"files": {}}, "signatures of target but no such file"),
        ({"signatures": {}}, "no signatures of target"),
    ],
)
def test_a_contradicting_manifest_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(document(**changes))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", "a/../b"])
def test_a_path_out_of_the_folder_is_refused(path: str) -> None:
    entry = {"path": path, "sha256": "", "size_bytes": 0}
    assert "unsafe path" in refusal(document(files={**json.loads(document())["files"], "target": entry}))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"manifest"', "[" * 100_000, "{}"])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    assert "not a valid manifest" in refusal(text)


@given(st.text(max_size=40), st.integers(0, 2_000), st.integers(0, 60))
def test_a_mutated_manifest_never_raises_anything_else(patch: str, start: int, length: int) -> None:
    text = MANIFEST.to_json()
    message = ""
    try:
        Manifest.from_json(text[:start] + patch + text[start + length :])
    except BundleError as error:
        message = str(error)
    assert "\n" not in message


def test_a_manifest_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no manifest\.json in"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="cannot read"):
        read_manifest(tmp_path)


def test_a_manifest_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match=r"manifest\.json is not a file"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").symlink_to("/dev/null")
    with pytest.raises(BundleError, match=r"manifest\.json is not a file"):
        read_manifest(tmp_path)


def test_a_manifest_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    os.truncate(tmp_path / "manifest.json", 1 << 40)  # sparse: it takes no space
    with pytest.raises(BundleError, match="has 1099511627776 bytes, too many for a manifest"):
        read_manifest(tmp_path)


def test_a_shape_that_is_not_fixed_is_refused() -> None:
    assert TensorSpec(name="mask", shape=(1, 1, 5, 64), dtype="float32").fixed_shape == (1, 1, 5, 64)
    with pytest.raises(BundleError, match="expected fixed sizes"):
        _ = TensorSpec(name="mask", shape=(1, "tokens"), dtype="float32").fixed_shape
    assert TensorSpec(name="kv_cache_k_0", shape=(1,), dtype="float32").is_cache


def test_a_signature_is_found_by_role_and_name() -> None:
    assert MANIFEST.signature("target", "verify").num_tokens == 5
    with pytest.raises(BundleError, match="drafter has no signature 'verify'"):
        MANIFEST.signature("drafter", "verify")


def test_a_file_entry_is_frozen() -> None:
    with pytest.raises(AttributeError):
        FileEntry(path="x", sha256="", size_bytes=0).path = "y"  # type: ignore[misc]  # that is the point


_NUMBERS = st.integers(0, 9999)


@given(st.sampled_from(("k", "v")), _NUMBERS, st.none() | _NUMBERS)
def test_a_cache_name_is_what_it_spells(part: Literal["k", "v"], index: int, reader: int | None) -> None:
    name = CacheName(part=part, index=index, reader=reader)
    assert CacheName.parse(str(name)) == name
    assert CacheName.parse(str(name.shared)) == CacheName(part=part, index=index)
    assert CacheName.in_name(str(name))
    assert name.next == output_name(str(name)) == f"{name}_next"
    assert cache_of_output(of_sequence(str(name), 3)) == of_sequence(str(name.shared), 3)


def test_the_names_of_caches() -> None:
    """LiteRT-LM and bundles that were written before know them by these."""
    assert list(map(str, CacheName.pair(4))) == ["kv_cache_k_4", "kv_cache_v_4"]
    assert str(CacheName(part="k", index=4, reader=9)) == "kv_cache_k_4.9"


@given(
    st.text(max_size=20)
    | st.text("kv_cahe0123456789./x", max_size=20)
    | st.from_regex(r"kv_cache_[kv]_[0-9]{1,6}(\.[0-9]{0,6})?.?", fullmatch=True)
)
@example("kv_cache_k_01")
@example("kv_cache_k_²")
@example("kv_cache_k_4\n")
@example("kv_cache_k_4_next")
@example("sequence_0/kv_cache_k_4")
@example("kv_cache_x_4")
@example("kv_cache_k_10000")
@example("kv_cache_k_4.")
def test_what_is_no_name_of_a_cache_is_refused(name: str) -> None:
    """A name is refused, or it is spelt again as it was."""
    if re.fullmatch(r"kv_cache_[kv]_(0|[1-9][0-9]{0,3})(\.(0|[1-9][0-9]{0,3}))?", name):
        assert str(CacheName.parse(name)) == name
        return
    with pytest.raises(BundleError, match="is no name of a KV cache"):
        CacheName.parse(name)


def test_outputs_of_a_graph_have_names_of_their_own() -> None:
    assert [output_name(name) for name in ("logits", "kv_cache_k_4.9", "sequence_2/kv_cache_v_0")] == [
        "logits",
        "kv_cache_k_4.9_next",
        "sequence_2/kv_cache_v_0_next",
    ]
    assert cache_of_output("logits") is None
