"""A conversation in which the model calls tools, gets their answers, and replies with them.

python examples/tools.py BUNDLE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mtp_runtime import Conversation, MtpError, Session

DECLARED = json.loads(Path(__file__).with_name("tools.json").read_text(encoding="utf-8"))


def answer(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool's answer to a call."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if name == "add":
        result: dict[str, Any] = {"result": arguments["a"] + arguments["b"]}
    elif name == "word_of_the_day":
        result = {"word": "lighthouse", "meaning": "a tower with a bright light that guides ships"}
    else:
        result = {"error": "there is no such tool"}
    return {"role": "tool", "name": name, "content": result}


def main(bundle: str) -> None:
    with Session.open(bundle) as session:
        conversation = Conversation(session, tools=DECLARED)
        for question in ("What is 231 plus 84?", "Tell me the word of the day for Monday.", "What is 7 plus 5?"):
            print(f"user: {question}")
            reply = conversation.say(question)
            reply.finish()
            for _ in range(4):  # rounds of calls, lest a model call for ever
                calls = reply.as_message().get("tool_calls", [])
                if not calls:
                    break
                answers = [answer(call) for call in calls]
                for call, answered in zip(calls, answers, strict=True):
                    print(f"call: {json.dumps(call['function'])}\ntool: {json.dumps(answered['content'])}")
                reply = conversation.say(answers)
                reply.finish()
            print(f"model: {reply.text}\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1])
    except MtpError as error:
        sys.exit(f"error: {error}")
