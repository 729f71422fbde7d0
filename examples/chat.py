"""A conversation of two turns, another second turn, and the same conversation in a session opened later.

    python examples/chat.py BUNDLE

Each prompt is the whole conversation; what the cache has of it is not processed again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from mtp_runtime import Conversation, MtpError, Session


def ask(conversation: Conversation, message: str) -> str:
    """Print a message and its reply as it comes; return the reply."""
    reply = conversation.say(message, max_new_tokens=48)
    print(f"user: {message}\nmodel: ", end="")
    for _, text in reply.with_text():
        print(text, end="", flush=True)
    stats = reply.stats
    print(f"\n({stats.reused_tokens} of {stats.prompt_tokens} prompt tokens reused)\n")
    return reply.text


def main(bundle: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "conversation"
        with Session.open(bundle) as session:
            conversation = Conversation(session)
            ask(conversation, "Write a function that adds two numbers.")
            ask(conversation, "Now one that multiplies them.")
            conversation.rewind(1)  # as if the second turn had not been
            conversation.save(saved)
            here = ask(conversation, "Now one that divides them.")
        with Session.open(bundle) as session:
            there = ask(Conversation.restore(session, saved), "Now one that divides them.")
    print("restored: the same reply" if here == there else "restored: another reply")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1])
    except MtpError as error:
        sys.exit(f"error: {error}")
