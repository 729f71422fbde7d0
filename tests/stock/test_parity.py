"""`mtp-export parity` names each difference of a container from its bundle, in a line of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mtp_export.bundle import litertlm
from mtp_export.bundle.metadata import llm_metadata
from mtp_export.source.checkpoint import hash_file
from mtp_runtime.bundle.contract import read_manifest
from tests.conftest import Export, run_cli

LIMITS = ("--limit", "2", "--max-new-tokens", "16", "--threads", "1")


def changed(source: Path, folder: Path, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a bundle whose container has other metadata, and a manifest that knows that file."""
    shutil.copytree(source, folder)
    manifest = read_manifest(folder)
    container = folder / manifest.files["litertlm"].path
    inner = msgspec.structs.replace(manifest, files={k: v for k, v in manifest.files.items() if k != "litertlm"})

    def other(path: Path, manifest: Any) -> Any:
        metadata = llm_metadata(path, manifest)
        change(metadata)
        return metadata

    monkeypatch.setattr(litertlm, "llm_metadata", other)
    litertlm.write_litertlm(folder, inner, container)
    files = {**manifest.files, "litertlm": hash_file(container)}
    litertlm.write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    return folder


def nothing(metadata: Any) -> None:
    pass


def another_template(metadata: Any) -> None:
    metadata.jinja_prompt_template = metadata.jinja_prompt_template.replace("<|turn>", "<|think|>")


def cut_stops(metadata: Any) -> None:
    del metadata.stop_tokens[1:]


def another_sampler(metadata: Any) -> None:
    metadata.sampler_params.k = 40


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (nothing, []),
        (
            another_template,
            [
                "DIFFERENT: LiteRT-LM chats, chat: six turns: prompt 1: expected …",
                "DIFFERENT: LiteRT-LM chats, MTP, chat: two tools: prompt 1: expected …",
                "WRONG: the .litertlm's jinja_prompt_template is not what the bundle's chat template becomes",
            ],
        ),
        (
            cut_stops,
            [
                "DIFFERENT: LiteRT-LM chats, chat: six turns: reply 1: expected ",
                'WRONG: the .litertlm\'s stop_tokens is [{"token_ids": {"ids": [1]}}], the bundle\'s files make it '
                '[{"token_ids": {"ids": [1]}}, {"token_ids": {"ids": [106]}}',
            ],
        ),
        (another_sampler, ['WRONG: the .litertlm\'s sampler_params is {"type": "TOP_P", "k": 40']),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_parity_names_each_difference(
    export_nano: Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], None],
    expected: list[str],
) -> None:
    folder = changed(export_nano("int8"), tmp_path / "bundle", change, monkeypatch)
    done = run_cli("parity", str(folder), *LIMITS, check=False)
    assert done.returncode == (1 if expected else 0), done.stdout + done.stderr
    for line in expected:
        assert any(printed.startswith(line) for printed in done.stdout.splitlines()), done.stdout
    assert ("FAILED" if expected else "PASSED") in done.stdout
    assert (folder / "parity.md").read_text(encoding="utf-8").count("## The container") == (1 if expected else 0)
