"""The side that runs the prompts: `python -m mtp_export.device.on_device REQUEST ANSWER`, here and on a device.

It needs the reference runtime and stock LiteRT-LM, and nothing else of the converter. A line of progress for every
generation goes to standard output, which is also how the other side knows that it lives.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from mtp_export.check.stock_runtime import StockRequest, run_stock
from mtp_export.device.protocol import Answer, PlaceDescription, Request, StockAnswer, TraceRun
from mtp_export.machine import processor, system, versions
from mtp_runtime import Session
from mtp_runtime.atomic import write_atomically
from mtp_runtime.errors import MtpError
from mtp_runtime.measure.teacher_forcing import FixedText, Reading, read_fixed

_PACKAGES = ("ai-edge-litert", "litert-lm-api", "numpy", "onnxruntime")
_SLOWEST_TOKEN_S = 10.0  # emulation included; slower than this, LiteRT-LM is taken to hang


def answer(request: Request) -> Answer:
    """Run `request` on this machine.

    Raises:
        MtpError: the bundle or a runtime fails.
    """
    traces: list[TraceRun] = []
    readings: list[Reading] = []
    stock: list[StockAnswer] = []
    if "mtp_runtime" in request.runtimes:
        # The transfer has compared every file with its hash; here they are compared with the manifest's sizes.
        with Session.open(
            request.bundle, threads=request.threads, verify=False, context_length=request.context_length
        ) as session:
            traces = [_traces(session, request, depth) for depth in request.depths]
            readings = _readings(session, _own_texts(traces) if request.texts is None else request.texts)
    if "LiteRT-LM" in request.runtimes and request.container is not None:
        for depth in request.depths:
            print(f"LiteRT-LM, K = {depth}", flush=True)
            run = run_stock(
                StockRequest(
                    model_path=request.container,
                    prompts=[prompt.text for prompt in request.prompts],
                    max_new_tokens=request.max_new_tokens,
                    context_length=request.context_length,
                    use_mtp=depth > 0,
                    threads=request.threads,
                    backend=request.backend,
                    timeout_s=300.0 + len(request.prompts) * request.max_new_tokens * _SLOWEST_TOKEN_S,
                )
            )
            stock.append(StockAnswer(num_draft_tokens=depth, run=run))
    return Answer(place=describe(), traces=tuple(traces), stock=tuple(stock), readings=tuple(readings))


def describe() -> PlaceDescription:
    """Describe the machine that this runs on."""
    where: Literal["host", "arm64-emulated"] = (
        "arm64-emulated" if os.environ.get("MTP_PLACE") == "arm64-emulated" else "host"
    )
    return PlaceDescription(
        where=where,
        machine=platform.machine(),
        cpu=processor(),
        system=system() if where == "host" else "Debian root behind adbd",
        emulator=os.environ.get("MTP_EMULATOR") if where == "arm64-emulated" else None,
        versions=versions(_PACKAGES),
    )


def _traces(session: Session, request: Request, depth: int) -> TraceRun:
    traces = []
    for prompt in request.prompts:
        print(f"mtp_runtime, K = {depth}, {prompt.id}", flush=True)
        generation = session.generate(
            prompt.text, max_new_tokens=request.max_new_tokens, num_draft_tokens=depth, with_margins=depth == 0
        )
        traces.append(generation.finish())
    return TraceRun(num_draft_tokens=depth, traces=tuple(traces))


def _own_texts(runs: Sequence[TraceRun]) -> list[FixedText]:
    plain = next(run.traces for run in runs if run.num_draft_tokens == 0)
    return [FixedText(prompt_ids=trace.prompt_ids, tokens=trace.tokens) for trace in plain]


def _readings(session: Session, texts: Sequence[FixedText]) -> list[Reading]:
    readings = []
    for number, text in enumerate(texts, 1):
        print(f"mtp_runtime, text {number} of {len(texts)}", flush=True)
        readings.append(read_fixed(session.backend, session.manifest, text))
    return readings


def _main(request_path: str, answer_path: str) -> int:
    request = msgspec.json.decode(Path(request_path).read_bytes(), type=Request)
    try:
        result = answer(request)
    except MtpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    write_atomically(Path(answer_path), msgspec.json.encode(result))
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
