"""What transformers makes of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtp_runtime.text.chat import Message


def rendered_by_transformers(template: str, messages: Sequence[Message], **options: Any) -> str:
    """Return the prompt that transformers renders, with "<bos>" as the beginning of a text."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [[dict(message) for message in messages]], chat_template=template, bos_token="<bos>", **options
    )
    text: str = rendered[0][0]
    return text
