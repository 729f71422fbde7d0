"""The options of a generation: a frozen value, its fields as keyword arguments, or both."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from mtp_runtime import Conversation, GenerationOptions, Session, UserError
from mtp_runtime.generate.options import OptionChanges
from tests.support.talking import fake_opener

PROMPT = (2, 9, 4)
SHORT = GenerationOptions(max_new_tokens=5, stop_token_ids=())


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return fake_opener(tmp_path, lambda position: position % 3 > 0)()


def test_a_value_and_keyword_arguments_are_the_same(session: Session) -> None:
    by_value = session.generate(PROMPT, SHORT).finish()
    by_keyword = session.generate(PROMPT, max_new_tokens=5, stop_token_ids=()).finish()
    assert by_value.tokens == by_keyword.tokens
    assert len(by_value.tokens) == 5


def test_keyword_arguments_stand_in_for_fields_of_the_value(session: Session) -> None:
    trace = session.generate(PROMPT, SHORT, max_new_tokens=9, num_draft_tokens=0).finish()
    assert (len(trace.tokens), trace.num_draft_tokens) == (9, 0)
    assert SHORT.max_new_tokens == 5


def test_a_conversation_takes_them_too(session: Session) -> None:
    reply = Conversation(session).say("ab", SHORT, max_new_tokens=3)
    assert len(reply.finish().tokens) == 3
    with pytest.raises(UserError, match="keep_length is the conversation's own matter"):
        Conversation(session).say("ab", GenerationOptions(keep_length=2))


def test_an_unknown_name_is_refused_with_those_that_exist(session: Session) -> None:
    with pytest.raises(TypeError, match=r"no option 'max_tokens' of a generation: give one of constraint, .*max_new"):
        session.generate(PROMPT, max_tokens=5)  # type: ignore[call-arg]  # that is the mistake


def test_an_empty_stop_text_is_refused_where_the_value_is_made() -> None:
    with pytest.raises(UserError, match="give texts of at least one character"):
        GenerationOptions(stop=("a", ""))


def test_every_field_is_a_keyword_argument() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(GenerationOptions)}
    assert fields == {name: each.__forward_arg__ for name, each in OptionChanges.__annotations__.items()}
    assert list(inspect.signature(Session.generate).parameters) == ["self", "prompt", "options", "changes"]
