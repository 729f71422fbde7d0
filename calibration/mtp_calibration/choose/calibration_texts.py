"""The texts that settings are chosen on: prompts as a checkpoint's own tokenizer and chat template have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtp_export.arch.spec import TargetSpec
from mtp_export.check.prompts import Prompt, calibration_prompts, for_tuning, heldout_prompts, read_prompts
from mtp_export.source import texts
from mtp_export.source.checkpoint import Checkpoint
from mtp_runtime.errors import UserError
from mtp_runtime.text.chat import render_chat
from mtp_runtime.text.tokenizer import Tokenizer

_LENGTH = 128  # of a text: all are padded to the longest


def tuning_prompts(path: Path | None) -> list[Prompt]:
    """Return a user's prompts, or those of the package that no bundle is judged on.

    Raises:
        UserError: the file cannot be read, or a line is no prompt.
    """
    return read_prompts(path) if path else heldout_prompts() + for_tuning(calibration_prompts())


def calibration_texts(target: Checkpoint, spec: TargetSpec, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """Return token ids of prompts; a long one becomes several texts, which begin as every text does.

    Raises:
        UserError: a prompt has messages and the checkpoint no chat template.
    """
    contents = texts.read_texts(target, spec)
    tokenizer = Tokenizer.parse(contents["tokenizer"], spec.bos_token_id, str(target.folder))
    special_tokens = texts.special_tokens(target)

    def text_of(prompt: Prompt) -> str:
        if not prompt.messages:
            return prompt.text
        if "chat_template" not in contents:
            raise UserError(f"prompt {prompt.id} has messages and the checkpoint no chat template: give texts")
        template, tools = contents["chat_template"], list(prompt.tools) or None
        return render_chat(template, prompt.messages, special_tokens=special_tokens, tools=tools)

    pieces = []
    for prompt in prompts:
        first, *ids = tokenizer.encode(text_of(prompt))
        pieces += [(first, *ids[start : start + _LENGTH - 1]) for start in range(0, len(ids), _LENGTH - 1)]
    return pieces
