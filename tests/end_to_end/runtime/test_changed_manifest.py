"""A manifest that is changed anywhere never ends in a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_runtime import MtpError, Session
from tests.support.toy_prompt import TOY_PROMPT

Document = dict[str, Any]


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where every number, string and null of a JSON document is."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*at, key))
    else:
        yield at


def changed(document: Document, at: tuple[Any, ...], chance: random.Random) -> Document:
    """Return a copy of `document` with the value `at` replaced by another."""
    copy: Document = json.loads(json.dumps(document))
    inner: Any = copy
    for key in at[:-1]:
        inner = inner[key]
    old = inner[at[-1]]
    new: tuple[Any, ...] = (0, "", {}, [])
    if isinstance(old, int | float):
        new = (old + 1, old - 1, 0, -1, 2 * old, 1 << 40)
    elif isinstance(old, str):
        new = ("", old + "x", old[::-1], "decode")
    inner[at[-1]] = chance.choice([value for value in new if value != old])
    return copy


def test_no_change_of_a_manifest_ends_in_a_traceback(toy_folder: Path, tmp_path: Path) -> None:
    """Values are changed at random: the bundle still generates, or it is refused in one line."""
    for path in toy_folder.iterdir():
        if path.name != "manifest.json":
            os.link(path, tmp_path / path.name)
    document = json.loads((toy_folder / "manifest.json").read_text(encoding="utf-8"))
    document |= {"suppress_tokens": [5], "special_tokens": {"bos_token": "<bos>"}}
    places = list(leaves(document))
    chance = random.Random(5)
    # One in four outside the signatures, where most numbers are.
    few = [at for at in places if at[0] != "signatures"]
    rounds = int(os.environ.get("MTP_FUZZ_ROUNDS", "120"))
    outcomes = {"opened": 0, "refused": 0}
    for _ in range(rounds):
        at = chance.choice(few if chance.random() < 0.25 else places)
        (tmp_path / "manifest.json").write_text(json.dumps(changed(document, at, chance)), encoding="utf-8")
        message = ""
        with contextlib.ExitStack() as opened:
            try:
                session = opened.enter_context(Session.open(tmp_path))
                session.generate(TOY_PROMPT, max_new_tokens=6).finish()
            except MtpError as error:
                message = str(error)
        outcomes["refused" if message else "opened"] += 1
        assert message.isprintable()
    assert min(outcomes.values()) >= 3, outcomes
