"""Parity of a place: MTP against plain decoding on the place itself, and the place against this machine.

MTP must give the place's own tokens exactly. Two machines need not give the same tokens: their processors round
differently, and after one near-tie the texts go separate ways. So the place is fed the text of this machine, and every
position is judged on its own (mtp_runtime.measure.teacher_forcing).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from mtp_export.check.parity import has_same_bits, stock_result, tolerance_of
from mtp_export.check.stock_runtime import StockRun
from mtp_export.device.protocol import Answer, Request, TraceRun
from mtp_export.device.report import Check, DeviceReport
from mtp_runtime.bundle.bundle import sha256_of
from mtp_runtime.bundle.contract import MANIFEST_NAME, Manifest, read_manifest
from mtp_runtime.generate.trace import GenerationTrace
from mtp_runtime.measure.parity import Comparison, RunnerResult, compare_text, compare_tokens
from mtp_runtime.measure.teacher_forcing import FixedText, compare_readings, distances
from mtp_runtime.text.tokenizer import Tokenizer

# Between kernels, in logits. Two processors run different ones, and ONNX Runtime on ARM64 takes others for one token
# than for several. Float graphs differ by the order of sums: 2e-5 at most for nano, emulated cortex-a76 against AVX512.
# Quantised ones also by steps of their int8 activations. Nano's logits differed by 0.48 at most and 0.15 at the median
# between the processors, and first choices at margins up to 0.17; between ONNX Runtime's passes by 0.31 and 0.10. With
# int4's weights in place of int8's, on one machine, it is 7.0, 1.7 and 4.8.
_ACROSS = {"f32": 1e-3}
_ACROSS_QUANTISED = 0.5
_HERE = "this machine without MTP"
_SAME_TEXT = "this machine, fed the same text"
_UNKNOWN_MARGIN = float(np.finfo(np.float32).max)  # of tokens that no reference gave: no near-tie can be stated there


def tolerance_across(recipe: str) -> float:
    """Return how far apart the two best logits may be for other kernels to choose differently, in logits."""
    return _ACROSS.get(recipe, _ACROSS_QUANTISED)


def host_request(request: Request, *, read: bool) -> Request:
    """Return what this machine runs of a request: the reference runtime without MTP, and with `read` its logits."""
    return msgspec.structs.replace(request, depths=(0,), runtimes=("mtp_runtime",), texts=None if read else ())


def fixed_texts(here: Answer) -> tuple[FixedText, ...]:
    """Return this machine's outputs as the texts that a place is fed."""
    return tuple(
        FixedText(prompt_ids=trace.prompt_ids, tokens=trace.tokens, candidates=reading.candidates)
        for trace, reading in zip(here.plain, here.readings, strict=True)
    )


def compare(bundle: Path, request: Request, here: Answer, there: Answer) -> DeviceReport:
    """Check a place's answer against itself and against this machine's, which may be the same.

    Raises:
        UserError: LiteRT-LM reads a prompt there as other tokens than we do.
    """
    manifest = read_manifest(bundle)
    names = [prompt.id for prompt in request.prompts]
    checks = _mtp_checks(manifest, request, names, there)
    if there is not here and there.readings:
        checks.append(_reading_check(manifest, names, here, there))
    checks += _stock_checks(bundle, request, names, here, there)
    if there.place.where == "arm64-emulated":
        # An emulated CPU's times say nothing about a device's.
        checks = [_without_speed(check) for check in checks]
    return DeviceReport(
        bundle_sha256=sha256_of(bundle / MANIFEST_NAME),
        model=manifest.model,
        recipe=manifest.recipe,
        max_new_tokens=request.max_new_tokens,
        host=here.place,
        place=there.place,
        checks=tuple(checks),
        left_out=tuple(_left_out(manifest, here, there)),
        traces=there.traces,
    )


def _mtp_checks(manifest: Manifest, request: Request, names: Sequence[str], there: Answer) -> list[Check]:
    # LiteRT's passes over one token and over several give equal bits on a CPU.
    tolerance = 0.0 if has_same_bits(manifest) else tolerance_across(manifest.recipe)
    checks = []
    for run in there.traces:
        if run.num_draft_tokens:
            comparisons = [
                compare_tokens(
                    name,
                    plain.tokens,
                    output.tokens,
                    margins=plain.margins,
                    tolerance=tolerance,
                    max_new_tokens=request.max_new_tokens,
                )
                for name, plain, output in zip(names, there.plain, run.traces, strict=True)
            ]
            drafted = any(trace.stats.rounds for trace in run.traces)
            if not drafted and all(comparison.verdict == "equal" for comparison in comparisons):
                comparisons = []  # outputs of one or two tokens leave nothing to draft: MTP did not run
            result = _result(run, comparisons)
            checks.append(Check(reference="itself without MTP", tolerance=tolerance, result=result))
    return checks


def _reading_check(manifest: Manifest, names: Sequence[str], here: Answer, there: Answer) -> Check:
    tolerance = tolerance_across(manifest.recipe)
    pairs = list(zip(here.readings, there.readings, strict=True))
    comparisons = [
        compare_readings(name, expected, reading, tolerance=tolerance)
        for name, (expected, reading) in zip(names, pairs, strict=True)
    ]
    plain = next(run for run in there.traces if run.num_draft_tokens == 0)
    return Check(
        reference=_SAME_TEXT, tolerance=tolerance, result=_result(plain, comparisons), distances=distances(pairs)
    )


def _stock_checks(bundle: Path, request: Request, names: Sequence[str], here: Answer, there: Answer) -> list[Check]:
    manifest = read_manifest(bundle)
    across, on_cpu = tolerance_across(manifest.recipe), request.backend == "cpu"
    reference, name, tolerance = here.plain, _HERE, across
    if there.plain:
        reference, name = there.plain, "mtp_runtime without MTP"
        tolerance = tolerance_of(manifest.recipe) if on_cpu else across
    tokenizer = Tokenizer.open(bundle / manifest.files["tokenizer"].path, manifest.bos_token_id)
    pieces = [_pieces(tokenizer, trace.tokens) for trace in reference]
    checks = []
    plain: StockRun | None = None
    for stock in there.stock:
        result = stock_result(stock.run, stock.num_draft_tokens, names, reference, pieces, tolerance)
        if stock.num_draft_tokens and plain is not None:
            # A GPU may take other kernels for several tokens than for one.
            own = 0.0 if on_cpu else across
            comparisons = [
                compare_stock_texts(prompt, trace, parts, (off.text, on.text), own)
                for prompt, trace, parts, off, on in zip(
                    names, reference, pieces, plain.outputs, stock.run.outputs, strict=True
                )
            ]
            result = msgspec.structs.replace(result, comparisons=tuple(comparisons))
            checks.append(Check(reference="itself without MTP", tolerance=own, result=result))
        else:
            checks.append(Check(reference=name, tolerance=tolerance, result=result))
            plain = None if stock.num_draft_tokens else stock.run
    return checks


def compare_stock_texts(
    prompt: str, reference: GenerationTrace, pieces: Sequence[str], texts: tuple[str, str], tolerance: float
) -> Comparison:
    """Compare LiteRT-LM's texts without and with MTP, in this order. With MTP it may go on by up to K tokens more.

    It gives no tokens. Those of the reference, as the `pieces` of text that they add, are taken with their margins as
    far as they spell the text without MTP; the rest is one piece, where no near-tie can be stated.
    """
    off, on = texts
    parts: list[str] = []
    for piece in pieces:
        if not off.startswith("".join(parts) + piece):
            break
        parts.append(piece)
    margins = list(reference.margins[: len(parts)])
    if rest := off[len("".join(parts)) :]:
        parts.append(rest)
        margins.append(_UNKNOWN_MARGIN)
    comparison = compare_text(prompt, parts, on, margins=margins, tolerance=tolerance)
    if comparison.verdict == "equal" and not rest and reference.finish_reason == "stop" and on != off:
        # With MTP it went on where the model stops.
        return msgspec.structs.replace(comparison, first_difference=len(parts), verdict="different")
    return comparison


def _result(run: TraceRun, comparisons: Sequence[Comparison]) -> RunnerResult:
    stats = [trace.stats for trace in run.traces]
    drafted, rounds = sum(s.drafted for s in stats), sum(s.rounds for s in stats)
    wall_ms = sum(s.generate_wall_ms for s in stats)
    later = sum(max(0, s.committed_tokens - 1) for s in stats)
    return RunnerResult(
        runner="mtp_runtime",
        num_draft_tokens=run.num_draft_tokens,
        tokens_per_second=1000.0 * later / wall_ms if wall_ms else None,
        acceptance_rate=sum(s.accepted for s in stats) / drafted if drafted else None,
        committed_per_round=sum(s.round_tokens for s in stats) / rounds if rounds else None,
        comparisons=tuple(comparisons),
    )


def _without_speed(check: Check) -> Check:
    return msgspec.structs.replace(check, result=msgspec.structs.replace(check.result, tokens_per_second=None))


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    if pieces:
        pieces[-1] += stream.finish()
    return pieces


def _left_out(manifest: Manifest, here: Answer, there: Answer) -> list[str]:
    left_out = []
    if there.place.where == "arm64-emulated":
        left_out.append("speed: the CPU is emulated, and its times say nothing about a device's")
    if there is here:
        left_out.append("the comparison with this machine: the place is this machine")
    if not there.traces:
        left_out.append("the reference runtime: --binary and --app run LiteRT-LM alone")
    if there.stock and all(run.num_draft_tokens for run in there.stock):
        left_out.append("LiteRT-LM without MTP: the program draws tokens as the bundle says, and has no option for it")
    if not there.stock and "litertlm" in manifest.files:
        left_out.append("LiteRT-LM: --no-stock was given")
    elif not there.stock:
        left_out.append(f"LiteRT-LM: it runs .litertlm files, and this bundle is {manifest.export_format}")
    return left_out
