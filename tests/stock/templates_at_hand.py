"""Templates that tests try: nano's, Google's where they are at hand, and one of each style that fine-tunes have."""

from __future__ import annotations

from pathlib import Path

from mtp_export.source.embedded import EMBEDDED

OURS = sorted(Path(__file__).with_name("templates").glob("*.jinja"))
NANO = EMBEDDED / "target/chat_template.jinja"
_SHARED = Path(__file__).parents[3] / "shared/published"
PUBLISHED = [_SHARED / f"chat_template_{size}_hf.jinja" for size in ("e2b", "31b")]
ALL = [NANO, *OURS, *PUBLISHED]
SPECIAL_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
STOPS = ("<eos>", "<turn|>", "<|tool_response>", "<|im_end|>")
TOKENIZER = EMBEDDED / "target/tokenizer.json"
