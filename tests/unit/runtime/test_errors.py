"""Messages are one printable line, whatever they quote."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mtp_runtime.errors import BackendError, BundleError, MtpError


@given(st.text())
def test_a_message_is_one_printable_line(text: str) -> None:
    message = str(MtpError(f"got {text}"))
    assert message.isprintable()
    assert message.startswith("got")


def test_words_and_single_spaces_stay() -> None:
    assert str(MtpError("no\n  bundle at \x1b[31mé")) == "no bundle at [31mé"


def test_the_users_mistakes_exit_with_2_and_ours_with_1() -> None:
    assert (BundleError("x").exit_code, BackendError("x").exit_code) == (2, 1)
