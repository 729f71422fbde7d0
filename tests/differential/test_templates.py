"""Chat templates wherever transformers finds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma4Processor

from mtp_export.errors import CheckpointError
from mtp_export.source import texts
from mtp_export.source.checkpoint import Checkpoint
from tests.differential import text_folders as folders
from tests.differential.text_folders import ALPACA, PROBE, TOOL_USE, config, edit, move_to_config, named, template
from tests.differential.transformation import Record

SUITE = folders.TextSuite()
equal, refused = SUITE.equal, SUITE.refused


# Where the template lies


@equal()
def template_in_tokenizer_config(folder: Path) -> None:
    move_to_config(folder, PROBE)


@equal()
def template_list_in_tokenizer_config(folder: Path) -> None:
    move_to_config(folder, [{"name": "default", "template": PROBE}, {"name": "tool_use", "template": TOOL_USE}])


@equal()
def template_map_in_tokenizer_config(folder: Path) -> None:
    move_to_config(folder, {"default": ALPACA, "tool_use": TOOL_USE})


@equal("the chat template named 'rag'")
def template_list_with_another_name(folder: Path) -> None:
    move_to_config(folder, [{"name": "default", "template": PROBE}, {"name": "rag", "template": TOOL_USE}])


@equal()
def template_list_without_default(folder: Path) -> None:
    move_to_config(folder, [{"name": "tool_use", "template": TOOL_USE}])


@equal("the chat template named 'rag'")
def template_list_without_any_that_is_used(folder: Path) -> None:
    move_to_config(folder, [{"name": "rag", "template": TOOL_USE}])


@equal()
def template_file_over_tokenizer_config(folder: Path) -> None:
    config(folder, chat_template="not this one")


@equal()
def template_file_over_a_list_in_tokenizer_config(folder: Path) -> None:
    config(folder, chat_template=[{"name": "tool_use", "template": "not this one"}])


@equal("the chat template named 'rag'")
def additional_templates(folder: Path) -> None:
    named(folder, tool_use=TOOL_USE, rag="not this one")


@equal()
def additional_template_alone(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    config(folder, chat_template="not this one")
    named(folder, tool_use=TOOL_USE)


@equal()
def additional_template_called_default(folder: Path) -> None:
    named(folder, default=ALPACA)


@equal()
def empty_folder_of_additional_templates(folder: Path) -> None:
    named(folder)


@equal()
def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


@equal()
def template_with_other_line_ends(folder: Path) -> None:
    template(folder, ALPACA.replace("\n", "\r\n"))
    named(folder, tool_use=TOOL_USE.replace("\n", "\r\n"))


@pytest.mark.parametrize("name", SUITE.cases)
def test_each(tmp_path: Path, name: str, record_property: Record) -> None:
    SUITE.run(name, tmp_path / "target", record_property)


class TestProcessors:
    """A template that only the processor has; the library reads its files without making one."""

    def of_processor(self, folder: Path) -> Any:
        return Gemma4Processor.get_processor_dict(folder)[0].get("chat_template")

    @pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
    def test_it_is_taken_where_the_tokenizer_has_none(self, tmp_path: Path, name: str) -> None:
        folder = folders.copied(tmp_path / "target")
        (folder / "chat_template.jinja").unlink()
        edit(folder / name, chat_template=ALPACA)
        assert self.of_processor(folder) == ALPACA
        assert texts.read_texts(Checkpoint(folder, "target"), folders.SPEC)["chat_template"] == ALPACA
        assert folders.notes_of(folder) == ()

    def test_its_config_comes_first(self, tmp_path: Path) -> None:
        folder = folders.copied(tmp_path / "target")
        (folder / "chat_template.jinja").unlink()
        edit(folder / "chat_template.json", chat_template="not this one")
        edit(folder / "processor_config.json", chat_template=ALPACA)
        assert self.of_processor(folder) == ALPACA
        assert texts.read_texts(Checkpoint(folder, "target"), folders.SPEC)["chat_template"] == ALPACA

    @pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
    def test_one_that_contradicts_the_tokenizers_is_reported(self, tmp_path: Path, name: str) -> None:
        folder = folders.copied(tmp_path / "target")
        edit(folder / name, chat_template=ALPACA)
        folders.compare(folder)
        assert folders.notes_of(folder) == (f"the chat template of {name}",)
        edit(folder / name, chat_template=PROBE)
        assert folders.notes_of(folder) == ()

    @pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
    @pytest.mark.parametrize("text", ["", "[]", "null", '{"chat_template": 5}', "{", "[" * 600 + "]" * 600, "\ufeff{}"])
    def test_a_damaged_one_is_left_aside_beside_the_tokenizers(self, tmp_path: Path, name: str, text: str) -> None:
        folder = folders.copied(tmp_path / "target")
        (folder / name).write_text(text, encoding="utf-8")
        folders.compare(folder)
        assert folders.notes_of(folder) == (f"{name}, in which no chat template can be read",)
        (folder / "chat_template.jinja").unlink()
        with pytest.raises(CheckpointError, match=name):
            texts.read_texts(Checkpoint(folder, "target"), folders.SPEC)


def test_a_file_whose_name_is_not_unicode(tmp_path: Path) -> None:
    folder = folders.copied(tmp_path / "target")
    named(folder, tool_use=TOOL_USE)
    path = folder / "additional_chat_templates" / os.fsdecode(b"\xff.jinja")
    path.write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not Unicode: rename or remove it") as refusal:
        texts.read_texts(Checkpoint(folder, "target"), folders.SPEC)
    str(refusal.value).encode()
    path.unlink()
    folders.compare(folder)


PUBLISHED = Path(__file__).parents[3] / "shared" / "published"


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="shared/published does not lie beside the repository")
@pytest.mark.parametrize("name", ["chat_template_e2b_hf.jinja", "chat_template_31b_hf.jinja"])
def test_a_published_template(tmp_path: Path, name: str) -> None:
    folder = folders.copied(tmp_path / "target")
    template(folder, (PUBLISHED / name).read_text(encoding="utf-8"))
    config(folder, tokenizer_class="GemmaTokenizer", image_token="<unk>")
    folders.compare(folder)
