"""Stock LiteRT-LM as a client: the toy bundle, packed as a `.litertlm`, in both runtimes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mtp_export.check.stock_runtime import StockRequest, StockRun, last_complaint, parse_acceptance_rate, run_stock
from mtp_runtime import BackendError, Session
from mtp_runtime.generate.trace import GenerationTrace
from tests.support.litertlm_files import build_container

PROMPT = " def add s"
COUNT = 20


def ours(folder: Path, **options: int) -> tuple[GenerationTrace, str]:
    with Session.open(folder) as session:
        trace = session.generate(PROMPT, max_new_tokens=COUNT, **options).finish()  # type: ignore[arg-type]  # ints only
        return trace, session.detokenize(trace.tokens)


def stock(path: Path, *, use_mtp: bool) -> StockRun:
    return run_stock(
        StockRequest(
            model_path=str(path),
            prompts=[PROMPT, PROMPT],
            max_new_tokens=COUNT,
            context_length=60,
            use_mtp=use_mtp,
            timeout_s=120,
        )
    )


@pytest.fixture(scope="module")
def oracle(
    toy_folder: Path, toy_with_drafter: Callable[[Sequence[int]], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a `.litertlm` whose drafter knows what comes after PROMPT."""
    with Session.open(toy_folder) as session:
        trace = session.generate(PROMPT, num_draft_tokens=0, stop_token_ids=()).finish()
    table = [*trace.prompt_ids, *trace.tokens]
    path = tmp_path_factory.mktemp("stock") / "toy.litertlm"
    build_container(toy_with_drafter([*table, *[0] * (80 - len(table))]), path)
    return path


def test_stock_generates_our_tokens_with_and_without_mtp(oracle: Path) -> None:
    trace, text = ours(oracle)
    assert trace.stats.acceptance_rate == 1.0
    plain, drafted = stock(oracle, use_mtp=False), stock(oracle, use_mtp=True)
    assert (plain.acceptance_rate, drafted.acceptance_rate) == (None, 1.0)
    for output in (*plain.outputs, *drafted.outputs):
        assert output.text.startswith(text)
        assert list(trace.prompt_ids[1:]) == output.prompt_ids
        assert COUNT <= output.num_tokens <= COUNT + 1
        assert output.decode_ms > 0


def test_a_file_that_stock_refuses_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.litertlm"
    path.write_bytes(b"LITERTLM" + bytes(64))
    with pytest.raises(BackendError, match=r"stock LiteRT-LM failed \(exit 1\): ") as caught:
        stock(path, use_mtp=True)
    assert "\n" not in str(caught.value)


def test_the_log_has_acceptance_and_errors() -> None:
    log = (
        "I0000 00:00:1795472211.765311    7040 llm_litert_mtp_drafter.cc:298] MTP Drafter - Success rate: 0.625\n"
        "E0000 00:00:1795472099.417216    6657 engine.cc:891] Failed to create session: INVALID_ARGUMENT: no stop.\n"
        "INFO: [accelerator_registry.cc:43] DestroyAccelerator\n"
    )
    assert parse_acceptance_rate(log) == 0.625
    assert parse_acceptance_rate("") is None
    assert last_complaint(log) == "Failed to create session: INVALID_ARGUMENT: no stop."
    assert last_complaint("one\ntwo\n") == "two"
    assert last_complaint("") == "its log is empty"
