"""Stock LiteRT-LM renders conversations as transformers does, with every style of template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from mtp_export.bundle.stock_template import check_template, habits_of, stock_template
from mtp_export.bundle.stock_template.conversations import Conversation, conversations
from mtp_export.bundle.stock_template.rendering import Rendered, render_in_stock
from mtp_export.bundle.stock_template.stub import write_stub
from mtp_export.errors import CheckpointError
from mtp_runtime.errors import MtpError
from mtp_runtime.text.chat import render_chat
from tests.stock.templates_at_hand import ALL, NANO, SPECIAL_TOKENS, STOPS, TOKENIZER


def read(path: Path) -> str:
    if not path.exists():
        pytest.skip(f"{path.name} is not at hand")
    return path.read_text(encoding="utf-8")


def check(template: str) -> int:
    tokenizer = TOKENIZER.read_text(encoding="utf-8")
    return check_template(template, special_tokens=SPECIAL_TOKENS, stops=STOPS, tokenizer_json=tokenizer)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_conversation(path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("conversations", check(read(path)))


def transformers_renders(conversation: Conversation, template: str, **options: Any) -> str:
    library: Any = render_jinja_template
    texts, _ = library(
        [list(conversation.messages)], chat_template=template, add_generation_prompt=True, **SPECIAL_TOKENS, **options
    )
    return str(texts[0])


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_our_renderer_is_that_of_transformers(path: Path) -> None:
    """On the same conversations: what the comparison in the stock runtime rests on."""
    template = read(path)
    rendered = 0
    for conversation in conversations():
        options: dict[str, Any] = {"tools": list(conversation.tools) or None, **conversation.variables}
        try:
            theirs = transformers_renders(conversation, template, **options)
        except (TemplateError, TypeError, ValueError, AttributeError):
            with pytest.raises(MtpError):
                render_chat(template, conversation.messages, special_tokens=SPECIAL_TOKENS, **options)
            continue
        ours = render_chat(template, conversation.messages, special_tokens=SPECIAL_TOKENS, **options)
        assert ours == theirs, conversation.name
        rendered += 1
    assert rendered > 30


def test_there_are_sixty_conversations() -> None:
    names = [conversation.name for conversation in conversations()]
    assert len(set(names)) == len(names) >= 60


LOOP = "{{ bos_token }}{% for m in messages %}%s{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"


def loop(body: str) -> str:
    return LOOP.replace("%s", body)


# Public reports of templates that fail in LiteRT-LM: each comes out the same.
REPORTED = {
    "get": loop("<|turn>{{ m.get('role') }}\n{{ m.get('content') }}<turn|>\n"),
    "startswith": loop(
        "<|turn>{{ m['role'] }}\n{% if m['content'] is string and m['content'].startswith('x') %}X{% endif %}"
        "{{ m['content'] }}<turn|>\n"
    ),
    "tojson without ascii": loop("<|turn>{{ m['role'] }}\n{{ m['content'] | tojson(ensure_ascii=False) }}<turn|>\n"),
    "tojson with indent": loop("<|turn>{{ m['role'] }}\n{{ m['content'] | tojson(indent=2) }}<turn|>\n"),
    "generation": loop("<|turn>{{ m['role'] }}\n{% generation %}{{ m['content'] }}{% endgeneration %}<turn|>\n"),
    "strftime": "{{ bos_token }}{{ strftime_now('%Y') }}" + loop("<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n"),
    "eos": loop("<|turn>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}<turn|>\n"),
    "raise": loop(
        "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n"
    ),
    "continue": loop(
        "{% if m['role'] == 'critic' %}{% continue %}{% endif %}<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n"
    ),
    "content alone": loop("<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n"),
}


@pytest.mark.parametrize("name", REPORTED)
def test_a_reported_template(name: str) -> None:
    assert check(REPORTED[name]) >= 100


# What MiniJinja has no counterpart of, and what the refusal names.
UNSUPPORTED = {
    "{{ '%s' % messages }}": "the operator % on a text",
    "{{ messages[0].content.isdigit() }}": "the method .isdigit()",
    "{{ messages[0].content.startswith(('a', 'b')) }}": "the method .startswith(…)",
    "{{ messages | pprint }}": "the filter 'pprint'",
    "{{ 2.5 | round }}": "the filter 'round'",
    "{{ messages | map('tojson') | list }}": "the filter 'map' with 'tojson'",
    "{{ messages[0].keys }}": ".keys without a call",
    "{{ messages is callable }}": "the test 'callable'",
    "{% macro m() %}{{ varargs }}{% endmacro %}{{ m(1) }}": "varargs",
    "{% filter upper %}x{% endfilter %}": "the statement filterblock",
    "{% block a %}x{% endblock %}": "the statement block",
    "{{ dict(*messages) }}": "* or ** in a call",
    "{{ messages | tojson(ensure_ascii=True) }}": "tojson with ensure_ascii",
    "{% set stock_x = 1 %}": "the name stock_x",
    "{% macro stock_text(v) %}x{% endmacro %}": "the name stock_text",
    "{{ stock_mark }}": "the name stock_mark",
    "{% macro m(a, b=a) %}{{ b }}{% endmacro %}{{ m(1) }}": "the name a in the value of another name beside it",
    "{% with a = 1, b = a %}{{ b }}{% endwith %}": "the name a in the value of another name beside it",
    "{% for m in messages recursive %}{% continue %}{% endfor %}": "continue or break in a recursive loop",
    "{% continue %}": "continue or break outside a loop",
    "{{ messages[0].content.rsplit('x') }}": "the method .rsplit(…)",
    "{{ messages[0].content.find('x', 3) }}": "the method .find(…, …)",
    "{{ messages[0].content.split(none, 1) }}": "the method .split(…, …)",
    "{{ messages[0].get() }}": "the method .get()",
    "{{ messages[0].content.title() }}": "the method .title()",
    "{{ 'a' | indent(2) }}": "the filter 'indent'",
    "{{ 'a' | replace('a', 'b', 1) }}": "the filter 'replace' with other arguments",
    "{{ [1, 2] | max }}": "the filter 'max'",
    "{% if messages | selectattr('x') %}x{% endif %}": "the filter 'selectattr' as a condition",
    "{{ messages[2:0:-1] }}": "a slice with a step and an end",
    "{{ now }}": "the name now",
    "{{ größe }}": "the name größe",
    "{{ '5' | int }}": "the filter 'int'",
    "{{ messages[0]['items'] is defined }}": "the test 'defined' of the key 'items'",
}


@pytest.mark.parametrize("template", UNSUPPORTED)
def test_a_construct_without_a_counterpart_is_refused_by_name(template: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check(template)
    assert UNSUPPORTED[template] in str(caught.value)
    assert "in line 1" in str(caught.value)
    assert "--chat-template" in str(caught.value)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}", "cannot be read"),
        ("{{ messages | nothing }}", "the filter 'nothing'"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end within 3 s"),
        (
            "{% set ns = namespace(x='a' * 99999) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "the chat template does",
        ),
        ("{{ raise_exception('never') }}", "does not render a user's question"),
        ("{{ messages[0].content }}" + "{{ (" + "not " * 900 + "messages) }}", "nested too deeply"),
        ("{{ '\\ud800' }}", "half of a surrogate pair"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ".__class__"),
        (
            "{% for m in messages %}{{ loop.index }}{{ messages | length }}{{ m.content }}{% endfor %}",
            "goes on behind a reply",
        ),
        ("{{ bos_token if messages | length > 1 }}{% for m in messages %}{{ m.content }}\n{% endfor %}", "begins with"),
    ],
    ids=[
        *("unfinished", "no such filter", "endless", "too large", "refuses all", "nested", "surrogate", "hostile"),
        *("counts messages", "bos at times"),
    ],
)
def test_a_bad_template_is_refused_in_one_line(template: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "range(" in template:  # others may take as long as a busy machine needs to start a process
        monkeypatch.setattr("mtp_export.bundle.stock_template.check._LIMIT_S", 3)
    with pytest.raises(CheckpointError) as caught:
        check(template)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_difference_is_shown_with_both_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_wrong(*arguments: Any, **options: Any) -> list[Rendered]:
        first, *others = render_in_stock(*arguments, **options)
        assert first.text is not None
        return [Rendered(first.text.replace("river", "stone")), *others]

    monkeypatch.setattr("mtp_export.bundle.stock_template.check.render_in_stock", one_wrong)
    with pytest.raises(CheckpointError) as caught:
        check(NANO.read_text(encoding="utf-8"))
    assert "first in the conversation 'a question'" in str(caught.value)
    assert 'transformers writes "<|turn>user\\nWhat is a river?' in str(caught.value)
    assert 'LiteRT-LM "<|turn>user\\nWhat is a stone?' in str(caught.value)


CONSTRUCTS = Path(__file__).with_name("constructs.txt").read_text(encoding="utf-8").splitlines()
VARIABLES: dict[str, Any] = {
    "s": "  aXb c ",
    "u": "é\u00a0x\n\ty\u200b",
    "q": 'say "hi" <b>&\'',
    "c": "\x1c\x1f x\x1d y\x1e",
    "n": None,
    "t": True,
    "f": False,
    "i": 3,
    "neg": -5,
    "huge": 2**53 + 1,
    "half": 2.5,
    "one": 1.0,
    "tiny": 1e-7,
    "small": -1.5e-10,
    "big": 1e20,
    "large": 1e16,
    "l": [1, "a", None, True, 2.5, {"k": "it's"}],
    "d": {"b": 1, "A": 2, "a": None},
    "dd": {"x": {"y": [1, 2]}, "z": {}},
    "e": [],
    "ed": {},
}


def test_each_construct_means_the_same(tmp_path: Path) -> None:
    """Expressions and statements over values of every kind: Python's ways with them, in MiniJinja."""
    lines = [line if line.startswith("{%") else f"{{{{ {line} }}}}" for line in CONSTRUCTS]
    whole = "{{ bos_token }}" + "".join(f"\x1e{line}" for line in lines)
    one = Conversation(name="constructs", messages=[{"role": "user", "content": "x"}], variables=VARIABLES)
    habits = habits_of(whole, special_tokens=SPECIAL_TOKENS, stops=STOPS)
    stock = stock_template(whole, habits, special_tokens=SPECIAL_TOKENS, stops=STOPS)
    write_stub(tmp_path / "x.litertlm", stock, TOKENIZER)
    (rendered,) = render_in_stock(tmp_path / "x.litertlm", [one], timeout_s=60)
    assert rendered.text is not None, rendered.error
    expected = render_chat(whole, one.messages, special_tokens=SPECIAL_TOKENS, **VARIABLES)
    theirs, ours = rendered.text.split("\x1e")[1:], expected.split("\x1e")[1:]
    different = {line: pair for line, *pair in zip(CONSTRUCTS, ours, theirs, strict=True) if pair[0] != pair[1]}
    assert different == {}
    assert len(CONSTRUCTS) > 150


def test_a_text_alone_stays_a_text_and_parts_stay_parts() -> None:
    """So that a template can tell them apart, as transformers lets it."""
    kinds = loop("{{ 'text' if m.content is string else m.content | length }}<turn|>")
    assert check(kinds) > 100


def test_code_in_a_text_stays_as_it_is() -> None:
    """LiteRT-LM rewrites calls of methods by patterns over the template's text, its literals too."""
    code = "d.items() s.strip() s.startswith('x') a.split('b')[0] q.replace('a', 'b') ', '.join(x) t.endswith(y)"
    assert check(loop(f'{code} {{{{ "{code}" if m.role == "user" }}}}{{{{ m.content }}}}<turn|>')) > 100
