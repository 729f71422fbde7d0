"""What counts as structured output."""

from __future__ import annotations

import pytest

from mtp_calibration.same_model.structured import is_valid
from mtp_export.check.prompts import Expectation

CALL = '<|tool_call>call:weather{city:<|"|>Oslo {x}<|"|>,days:2,where:[1,true,{a:null}],none:{}}<tool_call|>'


@pytest.mark.parametrize(
    ("text", "expects", "opened", "valid"),
    [
        (' "Ann", "year": 1}] and more', "json", '[{"name":', True),
        (' "Ann", "year": 1} and more', "json", '[{"name":', False),
        ("no object here", "json", "", False),
        (CALL, "tool_call", "", True),
        ("Let me see. " + CALL + CALL, "tool_call", "", True),
        ("It is cold in Oslo.", "tool_call", "", False),
        (CALL.replace("<tool_call|>", ""), "tool_call", "", False),
        (CALL.replace("days:2", "days:02"), "tool_call", "", False),
        (CALL.replace("days:2", "days"), "tool_call", "", False),
        (CALL.replace(",none:{}", ","), "tool_call", "", False),
        (CALL.replace('}<|"|>', "}"), "tool_call", "", False),
        (CALL + CALL.replace("call:weather", "weather"), "tool_call", "", False),
    ],
)
def test_validity(text: str, expects: Expectation, opened: str, valid: bool) -> None:
    assert is_valid(text, expects, opened) is valid
