"""Stop sequences end the text wherever token boundaries and rounds fall, and what follows is right."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtp_runtime import Session, UserError
from mtp_runtime.text.stop_strings import StoppingText
from mtp_runtime.text.tokenizer import Tokenizer
from tests.support import talking
from tests.support.talking import OpenSession, expected

PROMPT = (2, 9, 4, 7, 7, 3, 11, 30, 5, 6)
COUNT = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(talking.tokenizer_json(50), encoding="utf-8")
    return Tokenizer.open(path, 2)


def cut(texts: list[str], stops: list[str]) -> tuple[str, bool]:
    """Return the text before the first stop sequence in the first of `texts`, one after each token, that has any."""
    for text in texts:
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return text[: min(places)], True
    return texts[-1], False


@settings(deadline=None, max_examples=300)
@given(
    # "ab" is one token and two characters; single letters from a small alphabet repeat often.
    ids=st.lists(st.sampled_from([6, 7, 8, 9, 4]), max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
@example(ids=[8, 9, 6], stops=["a", "bcab"])  # one token completes both
def test_text_ends_where_a_stop_sequence_begins(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> None:
    text = StoppingText(tokenizer.stream(), stops)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.reached:
            break
    pieces.append(text.finish())
    whole = tokenizer.decode(ids)
    expected_text, stopped = cut([tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)], stops)
    assert text.text == expected_text
    assert "".join(pieces) == text.text == whole[: len(text.text)]
    assert bool(text.reached) == stopped
    assert not any(stop in text.text for stop in stops)
    if not stopped:
        assert text.text == whole


def test_what_may_become_a_stop_sequence_is_held_back(tokenizer: Tokenizer) -> None:
    text = StoppingText(tokenizer.stream(), ["ccd", "xyz"])
    a, c, d = (tokenizer.encode(letter)[-1] for letter in "acd")
    assert [text.push(token) for token in (a, c, c, c, a, c, c)] == ["a", "", "", "c", "cca", "", ""]
    assert text.text == "accca" + "cc"
    assert (text.push(d), text.reached, text.finish(), text.text) == ("", "ccd", "", "accca")
    held = StoppingText(tokenizer.stream(), ["ccd"])
    assert [held.push(c), held.push(c), held.finish()] == ["", "", "cc"]


@pytest.mark.parametrize("drafts", [0, 1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_stop_sequence_ends_the_output_wherever_it_falls(open_session: OpenSession, drafts: int, length: int) -> None:
    plain_ids = expected(open_session, PROMPT, COUNT)
    session = open_session()
    pieces = session.text_pieces(plain_ids)
    text = "".join(pieces)
    for start in range(0, len(text) - length + 1, 3):
        stop = text[start : start + length]
        begins = text.index(stop)
        # The token that completes the sequence is the last one.
        count = next(n for n in range(1, len(plain_ids) + 1) if len("".join(pieces[:n])) >= begins + length)
        generation = session.generate(
            PROMPT, max_new_tokens=COUNT, num_draft_tokens=drafts, stop=(stop, "never said"), stop_token_ids=()
        )
        streamed = list(generation.with_text())
        assert tuple(token.id for token, _ in streamed) == plain_ids[:count]
        assert "".join(piece for _, piece in streamed) == generation.text == text[:begins]
        assert (generation.finish_reason, generation.stop_string) == ("stop", stop)
        assert generation.stats.committed_tokens == count
        assert session.backend.kv_cache.filled_length == len(PROMPT) + count - 1
        assert session.processed_ids == (*PROMPT, *plain_ids[: count - 1])
        assert list(generation) == []


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("place", range(2, 12))
def test_continuing_after_a_stop_sequence_is_right(open_session: OpenSession, drafts: int, place: int) -> None:
    plain_ids = expected(open_session, PROMPT, COUNT)
    session = open_session()
    text = "".join(session.text_pieces(plain_ids))
    generation = session.generate(
        PROMPT, max_new_tokens=COUNT, num_draft_tokens=drafts, stop=text[place : place + 2], stop_token_ids=()
    )
    generation.finish()
    ids = session.token_ids
    rest = session.generate(
        ids, keep_length=len(ids) - 1, max_new_tokens=COUNT, num_draft_tokens=drafts, stop_token_ids=()
    ).finish()
    assert (*ids, *rest.tokens)[: len(PROMPT) + COUNT] == (*PROMPT, *plain_ids)
    # And what continues elsewhere: the stop sequence itself is not kept.
    other = (*PROMPT, *plain_ids[:2], 12)
    kept = min(len(PROMPT) + 2, len(session.processed_ids))
    assert session.generate(
        other, keep_length=kept, max_new_tokens=8, num_draft_tokens=drafts, stop_token_ids=()
    ).finish().tokens == expected(open_session, other, 8)


@pytest.mark.parametrize("drafts", [0, 4])
def test_the_budget_stays_exact(open_session: OpenSession, drafts: int) -> None:
    plain_ids = expected(open_session, PROMPT, COUNT)
    session = open_session()
    for count in range(1, COUNT):
        generation = session.generate(
            PROMPT, max_new_tokens=count, num_draft_tokens=drafts, stop="never said", stop_token_ids=()
        )
        trace = generation.finish()
        assert (trace.tokens, trace.finish_reason) == (plain_ids[:count], "max_tokens")
        assert generation.text == session.detokenize(plain_ids[:count])


def test_a_stop_sequence_that_the_last_token_completes_wins(open_session: OpenSession) -> None:
    plain_ids = expected(open_session, PROMPT, COUNT)
    session = open_session()
    pieces = session.text_pieces(plain_ids)
    count = next(n for n in range(4, COUNT) if pieces[n - 1] and pieces[n - 1] not in "".join(pieces[: n - 1]))
    generation = session.generate(PROMPT, max_new_tokens=count, stop=pieces[count - 1], stop_token_ids=())
    assert generation.finish().finish_reason == "stop"
    assert generation.text == "".join(pieces[: count - 1])


def test_text_contains_earlier_tokens_and_no_stop_id(open_session: OpenSession) -> None:
    plain_ids = expected(open_session, PROMPT, COUNT)
    session = open_session()
    stop_id = next(token for token in plain_ids[5:] if token > 6)
    end = plain_ids.index(stop_id)
    generation = session.generate(PROMPT, max_new_tokens=COUNT, stop_token_ids=[stop_id])
    next(generation)
    assert generation.text == session.detokenize(plain_ids[:1])
    generation.finish()
    assert generation.text == session.detokenize(plain_ids[:end])
    late = session.generate(PROMPT, max_new_tokens=COUNT, stop_token_ids=[stop_id])
    late.finish()
    assert late.text == session.detokenize(plain_ids[:end])
    assert late.stop_string is None


@pytest.mark.parametrize("stop", ["", ("a", ""), (7,)])
def test_a_stop_sequence_must_be_text(tmp_path: Path, stop: object) -> None:
    session: Session = talking.fake_opener(tmp_path, lambda position: True)()
    with pytest.raises(UserError, match="give texts of at least one character"):
        session.generate(PROMPT, stop=stop)  # type: ignore[arg-type]  # that is the mistake
