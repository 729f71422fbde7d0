"""Conversations as stock LiteRT-LM's Conversation renders them: the text that it would feed the model.

In a process of its own, as a template is from anywhere and the library logs what failed to file descriptor 2 only.
`python -m mtp_export.bundle.stock_template.rendering` is that process.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mtp_export.bundle.stock_template.conversations import Conversation, as_stock
from mtp_export.check.stock_runtime import declared_tools
from mtp_export.child_process import ChildFailedError, ChildTimeoutError, answer_parent, limit_memory, run_child
from mtp_runtime.errors import BackendError

_LIMIT_BYTES = 8 << 30
_FAILED = re.compile(r"(?:Failed to apply template|Failed to render message|Template creation failed): (.+)")


class Rendered(msgspec.Struct, frozen=True):
    """The text of a conversation, or why there is none; `refused`: the template itself refuses it."""

    text: str | None
    error: str = ""
    refused: bool = False


class _Task(msgspec.Struct):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    variables: dict[str, Any]


class _Request(msgspec.Struct):
    model_path: str
    tasks: list[_Task]


def render_in_stock(model_path: Path, conversations: Sequence[Conversation], *, timeout_s: float) -> list[Rendered]:
    """Render conversations with the template of a `.litertlm`.

    Raises:
        BackendError: the runtime refuses the file, fails or takes longer than `timeout_s`.
    """
    tasks = [
        _Task(messages=as_stock(c.messages), tools=[dict(t) for t in c.tools], variables=_variables(c))
        for c in conversations
    ]
    request = _Request(model_path=str(model_path), tasks=tasks)
    module = "mtp_export.bundle.stock_template.rendering"
    try:
        rendered, _ = run_child(module, request, list[Rendered], timeout_s=timeout_s)
    except ChildTimeoutError:
        raise BackendError(f"LiteRT-LM did not render the conversations within {timeout_s:g} s") from None
    except ChildFailedError as failure:
        raise BackendError(
            f"LiteRT-LM failed to render the conversations (exit {failure.exit_code}): {failure.last_line}"
        ) from None
    return rendered


def _variables(conversation: Conversation) -> dict[str, Any]:
    """Return the template's variables: a history is rendered without the beginning of a reply."""
    return {**conversation.variables, **({"add_generation_prompt": False} if conversation.going_on else {})}


def _render(request: _Request, folder: Path) -> list[Rendered]:
    import litert_lm

    limit_memory(_LIMIT_BYTES)
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    rendered = []
    cpu = litert_lm.Backend.CPU(thread_count=1)
    with (
        tempfile.TemporaryFile() as log,
        litert_lm.Engine(request.model_path, backend=cpu, cache_dir=":nocache") as engine,
    ):
        os.dup2(log.fileno(), 2)
        for task in request.tasks:
            log.truncate(0)
            log.seek(0)
            *history, newest = task.messages
            try:
                with engine.create_conversation(
                    messages=history,
                    tools=declared_tools(task.tools),
                    extra_context=task.variables,
                    automatic_tool_calling=False,
                ) as conversation:
                    text, error = conversation.render_message_to_string(newest), ""
            except RuntimeError as failure:
                text, error = "", str(failure)
            os.fsync(log.fileno())
            log.seek(0)
            error += log.read().decode("utf-8", errors="replace")
            failed = _FAILED.search(error)
            rendered.append(Rendered(None if failed else text, failed[1] if failed else ""))
    return rendered


if __name__ == "__main__":
    answer_parent(_Request, _render)
