"""Opening bundles: good ones, and what happens to bad ones, folder and `.litertlm` alike."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import msgspec
import pytest

from mtp_runtime import Bundle, BundleError, Session
from mtp_runtime.bundle.contract import FileEntry
from tests.support import toy_pair
from tests.support.litertlm_files import build_container, with_file
from tests.support.toy_prompt import TOY_PROMPT

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that is a bundle to all but the inference library."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for role in toy_pair.SIGNATURES:
        (bundle / f"{role}.tflite").write_bytes(role.encode() * 999)
    (bundle / "tokenizer.json").write_text(toy_pair.tokenizer_json(), encoding="utf-8")
    (bundle / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    toy_pair.write_manifest(bundle)
    return bundle


def refusal(path: Path, *, verify: bool = True) -> str:
    """Return the one line with which `path` is refused."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, verify=verify).close()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_a_folder_opens(folder: Path) -> None:
    with Bundle.open(folder) as bundle:
        assert bundle.manifest.model == "toy"
        assert bundle.path("target") == folder / "target.tflite"
        assert not bundle.has("tokenizer_config")
        with pytest.raises(BundleError, match="no file for tokenizer_config"):
            bundle.path("tokenizer_config")


def test_a_missing_bundle_is_refused(tmp_path: Path) -> None:
    assert "no bundle at" in refusal(tmp_path / "nowhere")
    assert "no manifest.json in" in refusal(tmp_path)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "drafter.tflite").unlink()
    assert "drafter.tflite (drafter) is missing" in refusal(folder)


def test_a_folder_in_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / "drafter.tflite").unlink()
    (folder / "drafter.tflite").mkdir()
    assert "is not a file" in refusal(folder)


def test_a_truncated_file_is_refused_even_without_hashing(folder: Path) -> None:
    path = folder / "target.tflite"
    path.write_bytes(path.read_bytes()[:-1])
    assert "target.tflite (target) has 5993 bytes, the manifest says 5994" in refusal(folder, verify=False)


def test_a_changed_byte_is_noticed_by_its_hash(folder: Path) -> None:
    path = folder / "target.tflite"
    path.write_bytes(b"T" + path.read_bytes()[1:])
    assert "target.tflite (target) has SHA-256" in refusal(folder)
    Bundle.open(folder, verify=False).close()


@pytest.fixture
def container(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "toy.litertlm"
    build_container(folder, path)
    return path


def test_a_container_opens_as_the_folder_does(folder: Path, container: Path) -> None:
    with Bundle.open(container) as bundle:
        unpacked = bundle.path("target").parent
        for role in (*toy_pair.SIGNATURES, "tokenizer", "chat_template"):
            assert bundle.path(role).read_bytes() == (folder / bundle.manifest.files[role].path).read_bytes()
    assert not unpacked.exists()


def test_nothing_unpacked_stays_when_a_container_is_refused(
    container: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(unpacked))
    data = bytearray(container.read_bytes())
    at = data.rindex(b"drafterdrafter")
    data[at] ^= 1
    container.write_bytes(data)
    assert "the .litertlm's drafter has SHA-256" in refusal(container)
    assert list(unpacked.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "section"),
    [
        ("target", "tf_lite_prefill_decode"),
        ("drafter", "tf_lite_mtp_drafter"),
        ("embedder", "tf_lite_embedder"),
        ("per_layer_embedder", "tf_lite_per_layer_embedder"),
    ],
)
def test_a_container_without_a_graph_is_refused(folder: Path, tmp_path: Path, part: str, section: str) -> None:
    build_container(folder, tmp_path / "x.litertlm", leave_out=part)
    assert f"the .litertlm has no {section} section" in refusal(tmp_path / "x.litertlm")


def test_a_container_without_a_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    build_container(folder, tmp_path / "x.litertlm", leave_out="manifest")
    assert "holds no manifest of mtp-export" in refusal(tmp_path / "x.litertlm")


def test_a_container_may_lack_what_only_the_folder_carries(folder: Path, tmp_path: Path) -> None:
    build_container(folder, tmp_path / "x.litertlm", leave_out="tokenizer")
    with Bundle.open(tmp_path / "x.litertlm") as bundle:
        assert not bundle.has("tokenizer")


@pytest.mark.parametrize(
    ("role", "changes", "message"),
    [
        ("drafter", {"size_bytes": 1}, "drafter has 6993 bytes, its manifest says 1"),
        ("tokenizer", {"size_bytes": 5}, "tokenizer has 6 bytes, its manifest says 5"),
        ("tokenizer", {"size_bytes": -1}, "gives its tokenizer -1 bytes"),
        ("tokenizer", {"size_bytes": 1 << 40}, "gives its tokenizer 1099511627776 bytes"),
        ("tokenizer", {"sha256": "0" * 64}, "tokenizer has SHA-256"),
        ("chat_template", {"sha256": "0" * 64}, "chat_template has SHA-256"),
        ("target", {"path": "../escaped"}, "unsafe path '../escaped'"),
        ("target", {"path": "/tmp/escaped"}, "unsafe path '/tmp/escaped'"),
        ("target", {"path": "drafter.tflite"}, "cannot unpack"),
    ],
)
def test_a_lying_manifest_inside_a_container_is_refused(
    folder: Path, tmp_path: Path, role: str, changes: dict[str, object], message: str
) -> None:
    manifest = Bundle.open(folder).manifest
    build_container(folder, tmp_path / "x.litertlm", manifest=with_file(manifest, role, **changes))
    assert message in refusal(tmp_path / "x.litertlm")
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (0, b"NOTMAGIC", "not a .litertlm file"),
        (8, struct.pack("<I", 9), "version 9"),
        (24, struct.pack("<Q", 1 << 60), "header ends at"),
        (24, struct.pack("<Q", 33), "header is damaged"),
        (32, struct.pack("<I", 1 << 31), "header is damaged"),
    ],
)
def test_a_damaged_header_is_refused(container: Path, at: int, data: bytes, message: str) -> None:
    content = bytearray(container.read_bytes())
    content[at : at + len(data)] = data
    container.write_bytes(content)
    assert message in refusal(container)


@pytest.mark.parametrize("length", [0, 7, 31, 40, 500, 20_000])
def test_a_truncated_container_is_refused(container: Path, length: int) -> None:
    container.write_bytes(container.read_bytes()[:length])
    refusal(container)


def test_no_mutation_of_a_container_ends_in_anything_but_a_bundle_or_one_line(container: Path, tmp_path: Path) -> None:
    """Bytes of the header are changed at random, hundreds of times: it opens whole, or it is refused in one line."""
    original = container.read_bytes()
    header_end = struct.unpack_from("<Q", original, 24)[0]
    chance = random.Random(11)
    outcomes = {"opened": 0, "refused": 0}
    for _ in range(400):
        content = bytearray(original)
        for _ in range(chance.choice((1, 1, 2, 8))):
            content[chance.randrange(8, header_end)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        container.write_bytes(content)
        message = ""
        try:
            Bundle.open(container).close()
        except BundleError as error:
            message = str(error)
        assert "\n" not in message
        outcomes["refused" if message else "opened"] += 1
    assert min(outcomes.values()) > 20


def test_a_container_generates_what_its_folder_does(
    toy_folder: Path, toy_plain: tuple[int, ...], tmp_path: Path
) -> None:
    build_container(toy_folder, tmp_path / "toy.litertlm")
    with Session.open(tmp_path / "toy.litertlm") as session:
        assert session.generate(TOY_PROMPT, stop_token_ids=()).finish().tokens == toy_plain
        assert session.detokenize(session.tokenize("s")) == "s"
        assert session.text_pieces([6, 9, 10, 11]) == ["s", *session.text_pieces([9, 10, 11])]


def test_two_roles_may_not_be_one_file_by_accident(folder: Path) -> None:
    """A folder may name one file twice; each role still has its own size and hash to meet."""
    manifest = Bundle.open(folder).manifest
    entry = FileEntry(path="target.tflite", sha256="0" * 64, size_bytes=5994)
    changed = msgspec.structs.replace(manifest, files={**manifest.files, "drafter": entry})
    (folder / "manifest.json").write_text(changed.to_json(), encoding="utf-8")
    assert "target.tflite (drafter) has SHA-256" in refusal(folder)
