"""Turning a conversation into a prompt with the bundle's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtp_runtime.errors import BundleError, UserError

Message = Mapping[str, str]


def render_chat(template: str, messages: Sequence[Message], *, bos_token: str) -> str:
    """Return the prompt that asks the model for its next turn after `messages` (each with `role` and `content`).

    The template is data from anywhere: it runs in jinja2's sandbox, with the names and options that transformers
    gives it.

    Raises:
        BundleError: the template does not work.
        UserError: the template refuses the conversation.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages], bos_token=bos_token, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        # Jinja passes on what the template's own expressions raise.
        raise BundleError(f"the bundle's chat template does not work ({error}): run with a plain prompt") from error


def _refuse(message: object) -> NoReturn:
    raise UserError(f"the bundle's chat template refuses this conversation: {message}")
