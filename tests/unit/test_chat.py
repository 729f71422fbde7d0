"""The bundle's chat template: it renders, and it is not trusted."""

from __future__ import annotations

import pytest

from mtp_runtime.chat import render_chat
from mtp_runtime.errors import BundleError, UserError

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ('user', 'model') %}{{ raise_exception('no such role') }}{% endif %}
<|turn>{{ message['role'] }}
{{ message['content'] | trim }}<turn|>
{% endfor %}
{%- if add_generation_prompt %}<|turn>model
{% endif %}"""


def render(template: str, role: str = "user") -> str:
    return render_chat(template, [{"role": role, "content": " hi "}], bos_token="<bos>")


def test_a_conversation_becomes_a_prompt() -> None:
    assert render(TEMPLATE) == "<bos><|turn>user\nhi<turn|>\n<|turn>model\n"


def test_what_the_template_refuses_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="refuses this conversation: no such role"):
        render(TEMPLATE, role="nobody")


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ unknown.name.deeper }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{{ 'a' + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
    ],
)
def test_a_template_that_does_not_work_is_one_line(template: str) -> None:
    with pytest.raises(BundleError, match="chat template does not work") as caught:
        render(template)
    assert "\n" not in str(caught.value)
