"""The prompts that come with the package, and a user's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mtp_export.check.prompts import KINDS, calibration_prompts, for_tuning, held_out, in_turn, of_kind, read_prompts
from mtp_runtime.errors import UserError


def test_every_prompt_has_its_provenance_and_hash() -> None:
    prompts = calibration_prompts()
    for prompt in prompts:
        assert prompt.licence == "CC0-1.0"
        assert prompt.source
        assert prompt.sha256 == hashlib.sha256(prompt.content.encode()).hexdigest()
    for kind in KINDS:
        assert len(of_kind(prompts, kind)) == 8
        assert of_kind(held_out(prompts), kind), f"no {kind} is held out"
        assert of_kind(for_tuning(prompts), kind)
    apart = {prompt.content for prompt in held_out(prompts)} & {prompt.content for prompt in for_tuning(prompts)}
    assert not apart
    assert {prompt.kind for prompt in in_turn(prompts, 4)} == set(KINDS)


@pytest.mark.parametrize("line", ['{"kind": "code"}', '{"text": "a", "messages": [{"role": "user", "content": "b"}]}'])
def test_a_prompt_has_a_text_or_messages(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match="line 2: got text and messages, or none"):
        read_prompts(path)
