"""Making the report of a bundle: prompts are run here, and the files of `calibrate` and `bench` are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mtp_calibration.report.acceptance import measure_acceptance, on_device, read_bench
from mtp_calibration.report.report import Example, Report
from mtp_export.check.prompts import Prompt, text_of
from mtp_runtime import GenerationTrace, Session
from mtp_runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """A bundle, the prompts to generate from, the name of this device, and profiles of others (`read_bench`)."""

    bundle: Path
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    device: str
    benches: tuple[Path, ...]
    threads: int


def make_report(request: ReportRequest, on_prompt: Callable[[str], None] = lambda line: None) -> Report:
    """Measure the bundle on this device, and report on it here and on the devices of the profiles.

    Raises:
        MtpError: the bundle fails, or a file cannot be read.
    """
    with Session.open(request.bundle, threads=request.threads) as session:
        others = [read_bench(path, session.manifest.model) for path in request.benches]
        rows, costs, traces = measure_acceptance(
            session, request.prompts, max_new_tokens=request.max_new_tokens, on_prompt=on_prompt
        )
        first_of_kind: dict[str, Example] = {}
        for prompt, trace in traces:
            first_of_kind.setdefault(prompt.kind, _example(session, prompt, trace))
        return Report(
            manifest=session.manifest,
            rows=tuple(rows),
            devices=tuple(on_device(name, there, rows) for name, there in ((request.device, costs), *others)),
            examples=tuple(first_of_kind.values()),
            calibration=read_calibration(request.bundle),
        )


def read_calibration(bundle: Path) -> dict[str, object] | None:
    """Return what `calibrate` wrote of a bundle, None if it was not run.

    Raises:
        UserError: the file is not what it writes.
    """
    path = bundle / "calibration.json"
    if not path.is_file():
        return None
    try:
        document = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): run mtp-export calibrate again") from error
    if not {"passed", "quality", "verdict"} <= document.keys():
        raise UserError(f"{path} is not what calibrate writes: run mtp-export calibrate again")
    return document


def _example(session: Session, prompt: Prompt, trace: GenerationTrace) -> Example:
    return Example(
        prompt_id=prompt.id,
        kind=prompt.kind,
        prompt=text_of(session, prompt),
        pieces=tuple(session.text_pieces(trace.tokens)),
        origins=trace.origins,
    )
