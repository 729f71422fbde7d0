"""LiteRT-LM's text with MTP against its text without, on one place."""

from __future__ import annotations

import msgspec
import pytest

from mtp_export.device.parity import compare_stock_texts, tolerance_across
from mtp_runtime.generate.stats import GenerationStats
from mtp_runtime.generate.trace import GenerationTrace

PIECES = ("a", "b", "c", "")
REFERENCE = GenerationTrace(
    model="nano",
    recipe="int8",
    num_draft_tokens=0,
    prompt_ids=(2,),
    tokens=(10, 11, 12, 1),
    origins=("plain",) * 4,
    margins=(9.0, 0.3, 9.0, 9.0),
    finish_reason="max_tokens",
    stats=GenerationStats(),
)


@pytest.mark.parametrize(
    ("plain", "drafted", "tolerance", "agreed", "verdict"),
    [
        ("abc", "abc", 0.0, 4, "equal"),
        ("abc", "abcd", 0.0, 4, "equal"),  # the last round is committed whole
        ("abc", "axc", 0.0, 1, "different"),
        ("abc", "axc", 0.5, 1, "near_tie"),
        ("abc", "xbc", 0.5, 0, "different"),
        ("abc", "ab", 0.5, 2, "different"),
        ("abXY", "abXYZ", 0.0, 3, "equal"),  # without MTP it parted from the reference, which is another check
        ("abXY", "abXZ", 0.5, 2, "different"),
        ("", "", 0.0, 0, "equal"),
    ],
)
def test_text_is_compared_piece_by_piece(plain: str, drafted: str, tolerance: float, agreed: int, verdict: str) -> None:
    comparison = compare_stock_texts("p", REFERENCE, PIECES, (plain, drafted), tolerance)
    assert (comparison.agreed, comparison.verdict) == (agreed, verdict)


def test_a_text_that_goes_on_after_the_stop_is_different() -> None:
    stopped = msgspec.structs.replace(REFERENCE, finish_reason="stop")
    assert compare_stock_texts("p", stopped, PIECES, ("abc", "abc"), 0.0).verdict == "equal"
    assert compare_stock_texts("p", stopped, PIECES, ("abc", "abcd"), 0.5).verdict == "different"


def test_only_float_graphs_are_close_across_processors() -> None:
    assert (tolerance_across("f32"), tolerance_across("int8"), tolerance_across("mobile")) == (1e-3, 0.5, 0.5)
