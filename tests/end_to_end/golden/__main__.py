"""`python -m tests.end_to_end.golden` writes the golden files anew. Review the difference: that is what changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.bundles import exported
from mtp_export.check.chats import parity_chats
from mtp_export.check.prompts import read_prompts
from mtp_export.check.stock_runtime import StockRequest, run_stock
from mtp_runtime import Session
from mtp_runtime.bundle.contract import read_manifest
from mtp_runtime.measure.parity import Comparison, compare_text, compare_tokens
from tests.end_to_end.golden.files import (
    CASES,
    CHATS,
    MAX_NEW_TOKENS,
    PROMPTS,
    RECIPES,
    TRACES,
    GoldenChat,
    GoldenTrace,
    GoldenTurn,
    ParityCase,
)


def _case(name: str, **changes: Any) -> ParityCase:
    return ParityCase(name=name, **({"tolerance": 0.05, "max_new_tokens": 8} | changes))


_CASES = (
    _case("equal", reference=(5, 6, 7), tokens=(5, 6, 7), margins=(1, 1, 1)),
    _case("near-tie at the tolerance", reference=(5, 6, 7), tokens=(5, 9, 7), margins=(1, 0.05, 1)),
    _case("just above it", reference=(5, 6), tokens=(5, 9), margins=(1, 0.051)),
    _case("only the first difference counts", reference=(5, 6, 7), tokens=(4, 6, 9), margins=(1, 1, 0.01)),
    _case("ended early", reference=(5, 6), tokens=(5,), margins=(1, 1)),
    _case("went on", reference=(5,), tokens=(5, 6), margins=(1,)),
    _case("more than asked", reference=(5, 6), tokens=(5, 6, 7), margins=(1, 1), tolerance=0, max_new_tokens=2),
    _case("text", pieces=("de", "f ", "x"), text="def x", margins=(1, 1, 1)),
    _case("text goes on", pieces=("de", "f "), text="def more", margins=(1, 1)),
    _case("text differs", pieces=("ä", "é", "x"), text="äêx", margins=(1, 0.2, 1)),
    _case("text, near-tie", pieces=("ä", "é", "x"), text="äêx", margins=(1, 0.02, 1)),
)


_AS_GENERATED = ("prompt_ids", "tokens", "origins", "finish_reason")  # fields that golden traces have unchanged


def judge(case: ParityCase) -> Comparison:
    """Return Python's verdict on a case."""
    near_ties: dict[str, Any] = {"margins": case.margins, "tolerance": case.tolerance}
    if case.text is not None:
        return compare_text(case.name, case.pieces, case.text, **near_ties)
    return compare_tokens(case.name, case.reference, case.tokens, max_new_tokens=case.max_new_tokens, **near_ties)


def traces_of(recipe: str, bundle: Path) -> list[GoldenTrace]:
    """Return what nano generates with a recipe, without and with MTP."""
    traces = []
    with Session.open(bundle, threads=1) as session:
        for prompt in read_prompts(PROMPTS):
            for depth in (0, session.manifest.num_draft_tokens):
                generation = session.generate(
                    prompt.text, max_new_tokens=MAX_NEW_TOKENS, num_draft_tokens=depth, with_margins=True
                )
                trace = generation.finish()
                traces.append(
                    GoldenTrace(
                        prompt=prompt.id,
                        recipe=recipe,
                        num_draft_tokens=depth,
                        margins=tuple(round(margin, 3) for margin in trace.margins),
                        pieces=tuple(session.text_pieces(trace.tokens)),
                        **{name: getattr(trace, name) for name in _AS_GENERATED},
                    )
                )
    return traces


def chats_of(bundle: Path) -> list[GoldenChat]:
    """Parity's chats in stock LiteRT-LM, with drafts."""
    chats = parity_chats()
    container = next(bundle.glob("*.litertlm"))
    run = run_stock(
        StockRequest(
            model_path=str(container),
            prompts=[],
            max_new_tokens=1,
            context_length=read_manifest(bundle).context_length,
            use_mtp=True,
            threads=1,
            chats=chats,
            max_chat_tokens=96,
        )
    )
    return [
        GoldenChat(
            name=chat.name,
            user_texts=chat.user_texts,
            answers=chat.answers,
            turns=tuple(GoldenTurn(message=turn.message, reply=turn.reply) for turn in turns),
        )
        for chat, turns in zip(chats, run.chats, strict=True)
    ]


def _write(path: Path, values: Sequence[msgspec.Struct]) -> None:
    path.write_text("".join(msgspec.json.encode(value).decode() + "\n" for value in values), encoding="utf-8")


if __name__ == "__main__":
    _write(CASES, [msgspec.structs.replace(case, expected=judge(case)) for case in _CASES])
    _write(CHATS, chats_of(exported(1024, "int8")))
    _write(TRACES, [trace for recipe in RECIPES for trace in traces_of(recipe, exported(1024, recipe))])
