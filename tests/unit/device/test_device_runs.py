"""Requests to a device: only runs that are greedy are held against greedy ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from mtp_export.device.protocol import TextPrompt
from mtp_export.device.runs import Job, greedy_runs
from mtp_runtime.bundle.contract import SamplerDefaults
from mtp_runtime.errors import UserError
from tests.support.fake_backend import fake_manifest


def job(bundle: Path, **changes: Any) -> Job:
    options: dict[str, Any] = {
        "where": "phone",
        "serial": None,
        "silence_s": 1.0,
        "binary": Path("litert_lm_advanced_main"),
        "app": False,
        "stock": True,
        "backend": "cpu",
        "prompts": (TextPrompt(id="one", kind="text", text="one"),),
        "max_new_tokens": 4,
        "threads": 1,
    }
    return Job(bundle=bundle, **(options | changes))


@pytest.mark.parametrize(
    ("sampler", "changes", "depths"),
    [
        (None, {}, (0, 4)),
        (SamplerDefaults(temperature=0.5), {}, (0, 4)),
        (SamplerDefaults(do_sample=True), {}, (4,)),
        (SamplerDefaults(do_sample=True), {"binary": None}, (0, 4)),
    ],
)
def test_the_program_runs_without_mtp_only_where_the_bundle_is_greedy(
    tmp_path: Path, sampler: SamplerDefaults | None, changes: dict[str, Any], depths: tuple[int, ...]
) -> None:
    manifest = msgspec.structs.replace(fake_manifest(), sampler=sampler)
    (tmp_path / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    program = job(tmp_path, **changes)
    assert greedy_runs(program, program.request("")).depths == depths


def test_a_bundle_runs_at_the_context_that_was_chosen(tmp_path: Path) -> None:
    manifest = fake_manifest(cache_length=257)  # above the context in whole steps
    chosen = msgspec.structs.replace(manifest, format_version=2, context_length=40, longest_context_length=66)
    (tmp_path / "manifest.json").write_text(chosen.to_json(), encoding="utf-8")
    lengths = [job(tmp_path, context_length=length).request("").context_length for length in (None, 66, 50)]
    assert lengths == [40, 66, 50]
    with pytest.raises(UserError, match=r"the context is 67, this bundle takes 6 to 66"):
        job(tmp_path, context_length=67).request("")


def test_a_context_in_which_litert_lm_takes_no_prompt_is_refused_where_it_is_to_run(tmp_path: Path) -> None:
    manifest = fake_manifest(cache_length=257, longest_context_length=256, prefill=(16, 32))
    manifest = msgspec.structs.replace(manifest, files={**manifest.files, "litertlm": manifest.files["target"]})
    (tmp_path / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    assert job(tmp_path, context_length=16).request("").context_length == 16
    with pytest.raises(UserError, match="context is 15, and LiteRT-LM takes no prompt in fewer than 16 tokens"):
        job(tmp_path, context_length=15).request("")
    assert job(tmp_path, context_length=15, stock=False).request("").context_length == 15
