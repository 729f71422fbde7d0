"""A target's text files through transformers and through our reading of them: the same special tokens, ids and prompts.
No weight is read and nothing is converted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as HFTokenizer
from transformers import AutoTokenizer

from mtp_export.arch.published import PAIRS
from mtp_export.errors import CheckpointError
from mtp_export.source import texts
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.embedded import EMBEDDED
from mtp_runtime.errors import UserError
from mtp_runtime.text.chat import Message, render_chat

SPEC = PAIRS["nano"].target
Change = Callable[[Path], None]

# What a template may ask of: every special token by name, whether it is there, and what the renderer gives.
PROBE = """\
{%- macro shown(name, value) -%}[{{ name }}={{ value if value is defined else '-' }}]{%- endmacro -%}
{{ shown('bos', bos_token) }}{{ shown('eos', eos_token) }}{{ shown('unk', unk_token) }}{{ shown('pad', pad_token) }}
{{ shown('cls', cls_token) }}{{ shown('sep', sep_token) }}{{ shown('mask', mask_token) }}{{ shown('docs', documents) }}
{{ shown('image', image_token) }}{{ shown('audio', audio_token) }}{{ shown('tool', tool_token) }}
{% for message in messages %}
{{ message['role'] + ': ' + (message['content'] or '') + (eos_token or '') }} {{ message.reasoning_content }}
{% endfor %}
{{ tools | tojson if tools is not none else 'no tools' }}"""
ALPACA = """\
{{ bos_token }}{% for m in messages %}
    {% if m['role'] == 'user' %}
### Instruction:
{{ m['content'] }}
    {% else %}
### Response:
{{ m['content'] + eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
### Response:
{% endif %}
"""
TOOL_USE = "\n  {% for tool in tools %}{{ tool.function.name }}{% endfor %}\n  {{ eos_token }}\n\n"
ANSWER = {"role": "assistant", "content": "two", "thinking": "hm"}
CONVERSATIONS: Sequence[list[Message]] = (
    [{"role": "user", "content": "one"}],
    [{"role": "user", "content": "one"}, ANSWER, {"role": "user", "content": "<b>three</b>"}],
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CODE = "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n    return a * b  # ▁ é 東京 🙂 \x07"
PROMPTS = (CODE, f"<bos><|turn>user\n{CODE}<turn|>\n<image><unk> x</s>", "", "   a  <eos>  <image> b ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
    change: Change
    words: Sequence[str]  # what is left aside, or of the refusal
    remedy: Change | None = None

    @property
    def refused(self) -> bool:
        return self.remedy is not None


class TextSuite:
    """The transformations of one module of tests, each named after what a tool does to nano's folder."""

    def __init__(self) -> None:
        """Start with none."""
        self.cases: dict[str, _Case] = {}

    def equal(self, *left_aside: str) -> Callable[[Change], Change]:
        """Register a change after which a bundle has what transformers gives, and `left_aside` is reported."""
        return self._register(lambda change: _Case(change=change, words=left_aside))

    def refused(self, words: str, remedy: Change) -> Callable[[Change], Change]:
        """Register a change that is refused with these words; following the remedy helps."""
        return self._register(lambda change: _Case(change=change, words=(words,), remedy=remedy))

    def _register(self, make: Callable[[Change], _Case]) -> Callable[[Change], Change]:
        def register(change: Change) -> Change:
            self.cases[getattr(change, "__name__", "")] = make(change)
            return change

        return register

    def run(self, name: str, folder: Path, record_property: Callable[[str, object], None]) -> None:
        """Change a copy of nano's folder, and compare with transformers, or read the refusal and follow its remedy."""
        case = self.cases[name]
        copied(folder)
        case.change(folder)
        if case.remedy is None:
            compare(folder)
            assert notes_of(folder) == tuple(case.words)
        else:
            with pytest.raises(CheckpointError) as refusal:
                texts.read_texts(Checkpoint(folder, "target"), SPEC)
            assert case.words[0] in str(refusal.value)
            assert str(folder) in str(refusal.value)
            case.remedy(folder)
            compare(folder)
        record_property("outcome", "refused" if case.refused else "equal")


def copied(folder: Path) -> Path:
    """nano's folder with a template that shows all, and no special tokens named beyond the standard ones."""
    folder.mkdir(parents=True)
    for path in (EMBEDDED / "target").iterdir():
        if path.suffix == ".safetensors":
            os.symlink(path, folder / path.name)
        else:
            shutil.copy(path, folder)
    (folder / "chat_template.jinja").write_text(PROBE, encoding="utf-8")
    config(folder, extra_special_tokens=...)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file, which may not be there yet; `...` removes one."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    value = {key: new for key, new in (value | changes).items() if new is not ...}
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def config(folder: Path, **changes: Any) -> None:
    edit(folder / "tokenizer_config.json", **changes)


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **flags}


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def drop_last(folder: Path) -> None:
    """Make room for a token: the last one of the vocabulary is taken out."""

    def change(document: dict[str, Any]) -> None:
        model = document["model"]
        last = max(model["vocab"], key=lambda text: model["vocab"][text])
        del model["vocab"][last]
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) != last]
        document["added_tokens"] = [added for added in document["added_tokens"] if added["content"] != last]

    edit_tokenizer(folder, change)


def template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8", newline="")


def move_to_config(folder: Path, value: Any) -> None:
    """Have the template in tokenizer_config.json, in place of a file."""
    (folder / "chat_template.jinja").unlink()
    config(folder, chat_template=value)


def named(folder: Path, **others: str) -> None:
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    for name, text in others.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text, encoding="utf-8", newline="")


def pad(folder: Path, text: str) -> None:
    """As the tokenizers library writes it, whatever is a special token."""
    tokenizer = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(text), pad_token=text, length=64)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def compare(folder: Path) -> None:
    oracle = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    checkpoint = Checkpoint(folder, "target")
    contents, tokens = texts.read_texts(checkpoint, SPEC), texts.special_tokens(checkpoint)
    assert tokens == oracle.special_tokens_map
    ours = HFTokenizer.from_str(contents["tokenizer"])
    # A class's own <mask> may have no row, and stays text then.
    for prompt in (*PROMPTS, *(["a<mask>b"] if len(oracle) <= SPEC.vocab_size else [])):
        ids = oracle(prompt, add_special_tokens=False)["input_ids"]
        assert ours.encode(prompt, add_special_tokens=False).ids == ids
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    for messages in CONVERSATIONS:
        for tools in (None, TOOLS):
            assert rendered(contents.get("chat_template"), tokens, messages, tools) == prompt_of(
                oracle, messages, tools
            )


def rendered(text: str | None, tokens: Mapping[str, str], messages: list[Message], tools: Any) -> str | None:
    """Our prompt; None where there is no template, or only one for other conversations."""
    if text is None:
        return None
    try:
        return render_chat(text, messages, special_tokens=tokens, tools=tools)
    except UserError:
        return None


def prompt_of(oracle: Any, messages: list[Message], tools: Any) -> str | None:
    """The library's prompt; None where it has no template, or only one for other conversations."""
    try:
        return str(oracle.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True))
    except ValueError:
        return None


def notes_of(folder: Path) -> tuple[str, ...]:
    target = Checkpoint(folder, "target")
    return (*texts.left_aside(target, SPEC), *texts.notes(target, SPEC))
