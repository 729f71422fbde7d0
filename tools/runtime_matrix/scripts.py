"""Sessions of a version of LiteRT-LM by script: prompts of so many tokens, answers, checkpoints. Imports nothing but
that version.

python -m tools.runtime_matrix.scripts REQUEST.json ANSWER.json

The request: {"bundle": path, "context": tokens or null, "mode": "OFF" or "ON", "scripts": [[step, …], …]}. The answer:
for each script its results, the last one {"error": …} if it ended with one. A script is a session; its steps are

    ["prompt", tokens, place]   feed so many tokens of Python's library, from about there on -> tokens
    ["answer", most]            greedy -> its pieces, with drafts a round's tokens each
    ["save", name], ["rewind", name]   a checkpoint, which only the C library has -> what it returns

or a chat, whose first step is ["chat", options of create_conversation], and its others

    ["message", text]           greedy -> the reply, its thought, and the tokens held
"""

from __future__ import annotations

import argparse
import ctypes
import inspect
import json
import sys
import tarfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litert_lm

from tools.runtime_matrix.probe import GREEDY, open_engine

_CHECKPOINTS = {"save": "litert_lm_session_save_checkpoint", "rewind": "litert_lm_session_rewind_to_checkpoint"}


class Prompts:
    """Texts of just so many tokens."""

    def __init__(self, engine: Any) -> None:
        source = "".join(inspect.getsource(module) for module in (textwrap, argparse, tarfile))
        self.engine, self.ids = engine, engine.tokenize(source)

    def text(self, tokens: int, place: int) -> str:
        """Return the first text behind `place` that is split into so many tokens again.

        Raises:
            ValueError: there is none.
        """
        for start in range(place, place + 100):
            text: str = self.engine.detokenize(self.ids[start : start + tokens])
            if len(self.engine.tokenize(text)) == tokens:
                return text
        raise ValueError(f"no text of {tokens} tokens behind {place}")


def checkpoint(session: Any, kind: str, name: str) -> int:
    """Save a checkpoint, or go back to it; return what the C library does: 0 where it worked."""
    function = getattr(session._lib, _CHECKPOINTS[kind])
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_int
    return int(function(session._ptr, name.encode()))


def step(session: Any, prompts: Prompts, kind: str, *options: Any) -> Any:
    """Do one step of a script and return its result."""
    if kind == "prompt":
        tokens, place = options
        session.run_prefill([prompts.text(tokens, place)])
        return tokens
    if kind == "answer":
        # The other call returns nothing at all where the context is full.
        return [text for part in session.run_decode_async() for text in part.texts]
    return checkpoint(session, kind, *options)


def message(chat: Any, text: str) -> list[Any]:
    """Send a message; return the reply, its thought, and how many tokens are held then."""
    reply = chat.send_message(text)
    text_of_reply = "".join(part.get("text", "") for part in reply.get("content", []))
    return [text_of_reply, reply.get("channels", {}).get("thought", ""), chat.token_count]


def results_of(script: list[list[Any]], do: Callable[..., Any]) -> list[Any]:
    """Do the steps of a script, to its end or to an error."""
    results: list[Any] = []
    for one in script:
        try:
            results.append(do(*one))
        except RuntimeError as error:
            return [*results, {"error": str(error)}]
    return results


def run_script(engine: Any, prompts: Prompts, script: list[list[Any]]) -> list[Any]:
    """Run a script in a session or a chat of its own."""
    if script[0][0] == "chat":
        with engine.create_conversation(sampler_config=GREEDY, **script[0][1]) as chat:
            return results_of(script[1:], lambda _, text: message(chat, text))
    most = max(options[0] for kind, *options in script if kind == "answer")
    with engine.create_session(apply_prompt_template=False, sampler_config=GREEDY, max_output_tokens=most) as session:
        return results_of(script, lambda *one: step(session, prompts, *one))


def main() -> None:
    """Answer a request."""
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    request_path, answer_path = (Path(argument) for argument in sys.argv[1:])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    with open_engine(request["bundle"], request["mode"], max_num_tokens=request["context"]) as engine:
        prompts = Prompts(engine)
        results = [run_script(engine, prompts, script) for script in request["scripts"]]
    answer_path.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
