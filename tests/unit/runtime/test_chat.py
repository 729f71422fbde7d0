"""The bundle's chat template: it renders, and it is not trusted."""

from __future__ import annotations

from typing import Any

import pytest

from mtp_runtime.errors import BundleError, UserError
from mtp_runtime.text.chat import Message, render_chat
from tests.support.chats import rendered_by_transformers

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
        "{{ 'word' | dictsort }}",
        "{{ unknown | tojson }}",
        "{{ strftime_now(7) }}",
        "{% set found = namespace() %}{{ found.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ 'a' * 10 ** 15 }}",
    ],
)
def test_a_template_that_does_not_work_is_one_line(template: str) -> None:
    with pytest.raises(BundleError, match="chat template does not work") as caught:
        render(template)
    assert "\n" not in str(caught.value)


# What published templates lean on, in one: macros that call later ones, namespaces, loop controls, training marks.
WIDE = """{%- macro outer(value) -%}{{ inner(value) }}{%- endmacro -%}
{%- macro inner(value, keys=True) -%}
    {%- if value is mapping -%}
        {%- for key, item in value | dictsort -%}
            {{- (key if keys) -}}:{{- inner(item, keys=keys) -}}{%- if not loop.last %},{% endif -%}
        {%- endfor -%}
    {%- else -%}{{- value | tojson -}}{%- endif -%}
{%- endmacro -%}
{%- set state = namespace(last=none) -%}
{{ bos_token }}
{% if tools %}
    {% for tool in tools %}
<tool>{{ outer(tool) }}</tool>
    {% endfor %}
{% endif %}
{% if enable_thinking | default(false) %}
<think>
{% endif %}
{% for message in (messages[1:] if messages[0].role == 'system' else messages) %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
    {% if message.role == 'end' %}{% break %}{% endif %}
    {% set state.last = message.role %}
{% generation %}{{ message.content.split('|')[0] | trim }}{% endgeneration %}

{{ message | tojson(indent=1) }}
{% endfor %}
{{ state.last | upper }} {{ strftime_now('%Y') | length }}
{% if add_generation_prompt %}model:{% endif %}"""
MESSAGES: list[Message] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": " a < b & 'é' | c"},
    {"role": "skip", "content": "x"},
    {"role": "assistant", "content": [], "tool_calls": [{"name": "f", "arguments": {"b": 1, "a": [True, None]}}]},
    {"role": "end", "content": "y"},
]


@pytest.mark.parametrize(
    ("tools", "prompt", "variables"),
    [
        (None, True, {}),
        ([{"z": 1, "f": {"name": "<n>", "list": [1, "x"]}}], False, {"enable_thinking": True}),
    ],
)
def test_transformers_renders_the_same(tools: list[Any] | None, prompt: bool, variables: dict[str, Any]) -> None:
    messages: list[Message] = [*MESSAGES[:3], {**MESSAGES[3], "content": "ok"}, MESSAGES[4]]
    options = {"tools": tools, "add_generation_prompt": prompt, **variables}
    text = render_chat(WIDE, messages, bos_token="<bos>", **options)
    assert text == rendered_by_transformers(WIDE, messages, **options)
    assert "a < b & 'é'" in text
    assert ("<think>" in text) == ("enable_thinking" in variables)
    assert '"x"' not in text.split("</tool>")[-1]
    assert "ASSISTANT 4" in text


def test_a_template_cannot_change_the_conversation() -> None:
    nested: list[Message] = [{"role": "user", "content": [{"type": "text"}]}]
    with pytest.raises(BundleError, match="chat template does not work"):
        render_chat("{{ messages[0].content[0].update({'type': 'x'}) }}", nested, bos_token="")
    assert nested == [{"role": "user", "content": [{"type": "text"}]}]
