"""`--chat-template FILE`, and where a bundle says that its template is from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_export.source.embedded import EMBEDDED
from mtp_runtime import Bundle
from mtp_runtime.bundle.contract import read_manifest
from tests.conftest import run_cli

PLAIN = "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"
PUBLISHED = Path(__file__).parents[3] / "shared/published/chat_template_e2b_hf.jinja"


def export(tmp_path: Path, template: Path, *more: str, check: bool = True) -> tuple[int, str]:
    output = ("--output", str(tmp_path / "bundle"))
    done = run_cli("export", "--recipe", "int8", "--chat-template", str(template), *output, *more, check=check)
    return done.returncode, done.stderr


def test_a_file_takes_the_place_of_the_checkpoints_template(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(PLAIN, encoding="utf-8")
    export(tmp_path, template)
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.chat_template is not None
    assert manifest.chat_template.source == "--chat-template mine.jinja"
    assert "target/mine.jinja" in [entry.path for entry in manifest.inputs]
    assert "target/chat_template.jinja" not in [entry.path for entry in manifest.inputs]
    for path in (tmp_path / "bundle", tmp_path / "bundle/nano.litertlm"):
        with Bundle.open(path) as bundle:
            assert bundle.path("chat_template").read_text(encoding="utf-8") == PLAIN


def test_a_published_template_is_named_with_its_date(tmp_path: Path) -> None:
    if not PUBLISHED.exists():
        pytest.skip("Google's template is not at hand")
    target = tmp_path / "target"
    shutil.copytree(EMBEDDED / "target", target)
    shutil.copy(PUBLISHED, target / "chat_template.jinja")
    run_cli("export", "--recipe", "int8", "--checkpoint", str(target), "--output", str(tmp_path / "bundle"))
    origin = read_manifest(tmp_path / "bundle").chat_template
    assert origin is not None
    assert (origin.of, origin.published) == ("google/gemma-4-E2B-it, google/gemma-4-E4B-it", "2026-07-09")


def missing(path: Path) -> None:
    pass


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def empty(path: Path) -> None:
    path.write_text(" \n", encoding="utf-8")


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def too_large(path: Path) -> None:
    path.write_text("x" * (1 << 20) + "y", encoding="utf-8")


def broken(path: Path) -> None:
    path.write_text("{% for m in messages %}", encoding="utf-8")


def unsupported(path: Path) -> None:
    path.write_text("{{ messages | pprint }}", encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (missing, "is missing: give an existing file"),
        (folder, "is not a file"),
        (pipe, "is not a file"),
        (empty, "is empty"),
        (no_text, "is no UTF-8 text"),
        (too_large, "is larger than 1 MiB: this is no template"),
        (broken, "the chat template cannot be read (Unexpected end of template."),
        (unsupported, "the chat template uses the filter 'pprint' in line 1"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_bad_file_is_one_line(tmp_path: Path, make: Callable[[Path], None], expected: str) -> None:
    make(tmp_path / "x.jinja")
    assert expected in refusal(tmp_path, tmp_path / "x.jinja")


def test_a_name_that_is_not_unicode_is_one_line(tmp_path: Path) -> None:
    """The manifest, which is JSON, could not hold it."""
    template = tmp_path / os.fsdecode(b"mine\xff.jinja")
    template.write_text(PLAIN, encoding="utf-8")
    line = refusal(tmp_path, template)
    assert line.endswith("--chat-template: the name of the file 'mine\\udcff.jinja' is not Unicode: rename it")


def refusal(tmp_path: Path, template: Path) -> str:
    """Return the one line with which an export is refused."""
    code, errors = export(tmp_path, template, check=False)
    (line,) = errors.strip().splitlines()
    assert code == 2
    assert not (tmp_path / "bundle").exists()
    return line
