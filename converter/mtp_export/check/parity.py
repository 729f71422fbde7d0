"""The parity of a bundle: the same prompts and chats in every runtime that runs it, compared token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from mtp_export.bundle.metadata import llm_metadata, metadata_differences
from mtp_export.check.chat_parity import compare_stock_chat, compare_tokens_of_chat, hold
from mtp_export.check.own_runs import CHAT_TOKENS, Reference, reference_chats, run_prompts
from mtp_export.check.prompts import Prompt, text_of
from mtp_export.check.stock_runtime import StockRequest, StockRun, check_stock_context, known_faults, run_stock
from mtp_runtime import GenerationTrace, Manifest, Session
from mtp_runtime.bundle.contract import PARAM_TENSOR
from mtp_runtime.bundle.litertlm import read_metadata
from mtp_runtime.errors import UserError
from mtp_runtime.generate.stats import (
    overall_acceptance_rate,
    overall_committed_per_round,
    overall_tokens_per_second,
)
from mtp_runtime.measure.parity import Comparison, ParityReport, RunnerResult, compare_text, compare_tokens

# Thresholds of near-ties, in logits (soft-capped at ±30), for runs by different kernels: another library, processor or
# order of sums. Where kernels are the same the bits are, and the threshold is 0: `own_tolerance`.
# Float kernels differ by the order of a sum's terms: logits by some 1e-5. A wrong row or mask makes more than 1e-2.
_FLOAT_TOLERANCE = 1e-3
# A quantised graph rounds its activations to int8: a difference of 1e-6 before the rounding can be a step of 1 in 127
# after it. Between one-token and five-token passes of nano on different kernels, 1e-2 was measured.
_QUANTISED_TOLERANCE = 0.05

_MOST_CHAT_TOKENS = 2000  # of all chats
_SLOWEST_TOKEN_S = 1.0  # slower than this, stock LiteRT-LM is taken to hang

OnRun = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityRequest:
    """The bundle and how it is to be run: `max_new_tokens` for each of `prompts`, with so many threads, in a context of
    `context_length` tokens, None for its own.

    With the `checkpoint` that a float bundle was exported from, transformers runs too; with `stock`, LiteRT-LM does.
    """

    bundle: Path
    prompts: Sequence[Prompt]
    max_new_tokens: int
    threads: int
    context_length: int | None = None
    checkpoint: Path | None
    stock: bool


def prove(request: ParityRequest, on_run: OnRun = lambda name: None) -> ParityReport:
    """Compare every runner with our runtime without MTP: itself with every K, transformers, and LiteRT-LM with MTP off
    and on. If there is a chat template, chats too, in our Conversation, transformers and LiteRT-LM's.

    Raises:
        MtpError: the bundle or a runtime fails.
    """
    with Session.open(request.bundle, threads=request.threads, context_length=request.context_length) as session:
        manifest, no_stock = session.manifest, _without_stock(request, session)
        if no_stock is None:
            check_stock_context(manifest)
        prompts = [msgspec.structs.replace(p, text=text_of(session, p), messages=()) for p in request.prompts]
        runs = run_prompts(session, prompts, request.max_new_tokens, on_run)
        reference = Reference(
            prompts=prompts,
            traces=runs[0],
            pieces=[session.text_pieces(trace.tokens) for trace in runs[0]],
            max_new_tokens=request.max_new_tokens,
            chats=reference_chats(session, on_run),
        )
        left_out = list(reference.chats.left_out)
        no_transformers = _without_transformers(request, manifest)
        left_out += [reason for reason in (no_stock, no_transformers) if reason]
        findings: list[str] = []
        results = _own_results(session, runs, reference)
        if request.checkpoint is not None and no_transformers is None:
            on_run("transformers")
            results += _transformers_results(request.checkpoint, reference, tolerance_of(manifest.recipe))
        faults = None
        if no_stock is None:
            faults = known_faults()
            stock_results, findings = _stock_results(request, session, reference, on_run)
            results += stock_results
    return ParityReport(
        model=manifest.model,
        recipe=manifest.recipe,
        reference="the reference runtime without MTP",
        tolerance=tolerance_of(manifest.recipe),
        max_new_tokens=request.max_new_tokens,
        results=tuple(results),
        left_out=tuple(left_out),
        findings=tuple(findings),
        notes=(faults,) if faults else (),
    )


def tolerance_of(recipe: str) -> float:
    """Return how far apart the two best logits of a recipe may be for either to be right, if the kernels differ."""
    return _FLOAT_TOLERANCE if recipe == "f32" else _QUANTISED_TOLERANCE


def has_same_bits(manifest: Manifest) -> bool:
    """Return whether a token's logits have the same bits in every pass of our runtime on a CPU, and so with and without
    drafts (docs/decisions/0011).

    Not so in ONNX Runtime, whose products over one row take another path than those over several; nor in a bundle for
    a GPU, which reads the whole cache, in other blocks for one token than for several.
    """
    inputs = manifest.signature("target", "decode").inputs if manifest.export_format == "tflite" else ()
    return bool(inputs) and all(tensor.name != PARAM_TENSOR for tensor in inputs)


def own_tolerance(manifest: Manifest) -> float:
    """Return the threshold, in logits, for our runtime with drafts against itself without them on the same machine."""
    return 0.0 if has_same_bits(manifest) else tolerance_of(manifest.recipe)


def stock_result(
    run: StockRun,
    k: int,
    prompt_ids: Sequence[str],
    plain: Sequence[GenerationTrace],
    pieces: Sequence[Sequence[str]],
    tolerance: float,
) -> RunnerResult:
    """Compare stock LiteRT-LM's `run` with the `plain` traces of the reference, by the text that each token adds.

    Raises:
        UserError: it reads a prompt as other tokens than we do.
    """
    comparisons = []
    for prompt, trace, parts, output in zip(prompt_ids, plain, pieces, run.outputs, strict=True):
        read = output.prompt_ids
        if read is not None and read != list(trace.prompt_ids)[-len(read) :]:
            raise UserError(f"prompt {prompt}: LiteRT-LM reads it as other tokens than we do: report this tokenizer")
        comparison = compare_text(prompt, parts, output.text, margins=trace.margins, tolerance=tolerance)
        if comparison.verdict == "equal" and trace.finish_reason == "stop" and output.text != "".join(parts):
            # It went on where the model stops: the bundle's metadata has other stop tokens than its manifest.
            comparison = msgspec.structs.replace(comparison, first_difference=len(parts), verdict="different")
        comparisons.append(comparison)
    return RunnerResult(
        runner="LiteRT-LM",
        num_draft_tokens=k,
        tokens_per_second=run.tokens_per_second,
        acceptance_rate=run.acceptance_rate,
        committed_per_round=None if run.acceptance_rate is None else 1 + k * run.acceptance_rate,
        comparisons=tuple(comparisons),
        tolerance=tolerance,
    )


def _without_transformers(request: ParityRequest, manifest: Manifest) -> str | None:
    """Return why transformers is left out, None if it is not."""
    if manifest.recipe != "f32":
        return f"transformers: it runs float weights, and this bundle is {manifest.recipe}"
    if request.checkpoint is None:
        return "transformers: name the checkpoint that the bundle was made from with --checkpoint"
    return None


def _without_stock(request: ParityRequest, session: Session) -> str | None:
    """Return why stock LiteRT-LM is left out, None if it is not."""
    if not request.stock:
        return "stock LiteRT-LM: --no-stock was given"
    if request.bundle.is_dir() and not session.bundle.has("litertlm"):
        return f"stock LiteRT-LM: it runs .litertlm files, and this is {session.manifest.export_format}"
    return None


def _own_results(
    session: Session, runs: Sequence[Sequence[GenerationTrace]], reference: Reference
) -> list[RunnerResult]:
    tolerance, k = own_tolerance(session.manifest), session.manifest.num_draft_tokens
    results = []
    for depth, traces in enumerate(runs):
        comparisons = _compare(reference, [trace.tokens for trace in traces], tolerance)
        results.append(_own_result("mtp_runtime", depth, traces, comparisons, tolerance))
    if reference.chats:
        comparisons, replies = [], []
        for chat, expected in zip(reference.chats.chats, reference.chats.turns, strict=True):
            turns = hold(session, chat, max_new_tokens=CHAT_TOKENS, num_draft_tokens=k)
            outputs = [turn.trace.tokens for turn in turns]
            comparisons.append(compare_tokens_of_chat(chat, expected, outputs, tolerance=tolerance))
            replies += [turn.trace for turn in turns]
        results.append(_own_result("mtp_runtime chats", k, replies, comparisons, tolerance))
    return results


def _compare(reference: Reference, outputs: Sequence[Sequence[int]], tolerance: float) -> list[Comparison]:
    return [
        compare_tokens(
            prompt,
            trace.tokens,
            output,
            margins=trace.margins,
            tolerance=tolerance,
            max_new_tokens=reference.max_new_tokens,
        )
        for prompt, trace, output in zip(reference.prompt_ids, reference.traces, outputs, strict=True)
    ]


def _own_result(
    runner: str, k: int, traces: Sequence[GenerationTrace], comparisons: Sequence[Comparison], tolerance: float
) -> RunnerResult:
    stats = [trace.stats for trace in traces]
    return RunnerResult(
        runner=runner,
        num_draft_tokens=k,
        tokens_per_second=overall_tokens_per_second(stats) or 0.0,
        acceptance_rate=overall_acceptance_rate(stats),
        committed_per_round=overall_committed_per_round(stats),
        comparisons=tuple(comparisons),
        tolerance=tolerance,
    )


def _transformers_results(checkpoint: Path, reference: Reference, tolerance: float) -> list[RunnerResult]:
    """Other kernels than ours: within a tolerance."""
    chats = reference.chats
    replies = [turn.trace for turns in chats.turns for turn in turns]
    outputs = _greedy(checkpoint, [*reference.traces, *replies])
    count = len(reference.traces)
    results = [_untimed("transformers", 0, _compare(reference, outputs[:count], tolerance), tolerance)]
    if chats:
        of_chats, comparisons = iter(outputs[count:]), []
        for chat, turns in zip(chats.chats, chats.turns, strict=True):
            tokens = [next(of_chats) for _ in turns]
            comparisons.append(compare_tokens_of_chat(chat, turns, tokens, tolerance=tolerance))
        results.append(_untimed("transformers chats", 0, comparisons, tolerance))
    return results


def _greedy(checkpoint: Path, traces: Sequence[GenerationTrace]) -> list[list[int]]:
    from mtp_export.check.reference import greedy

    try:
        return greedy(checkpoint, [trace.prompt_ids for trace in traces], [trace.tokens for trace in traces])
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot load {checkpoint}: {error}") from error


def _stock_results(
    request: ParityRequest, session: Session, reference: Reference, on_run: OnRun
) -> tuple[list[RunnerResult], list[str]]:
    """Run LiteRT-LM with MTP off and on; it brings a LiteRT of its own, of another version: within a tolerance.

    Returns:
        The results, and the differences of the container's metadata from the bundle's files.
    """
    manifest, chats, tolerance = session.manifest, reference.chats, tolerance_of(session.manifest.recipe)
    container = session.bundle.path("litertlm") if request.bundle.is_dir() else request.bundle
    expected = llm_metadata(session.bundle.path("tokenizer").parent, session.bundle.exported)
    bos = "" if expected.HasField("start_token") else session.tokenizer.bos_token
    tokens = len(reference.prompts) * request.max_new_tokens + _MOST_CHAT_TOKENS
    plain = StockRequest(
        model_path=str(container),
        prompts=[bos + prompt.text for prompt in reference.prompts],
        max_new_tokens=request.max_new_tokens,
        context_length=manifest.context_length,
        use_mtp=False,
        threads=request.threads,
        timeout_s=300.0 + tokens * _SLOWEST_TOKEN_S,
        chats=chats.chats,
        max_chat_tokens=CHAT_TOKENS,
    )
    results = []
    for runner, k in (("LiteRT-LM", 0), ("LiteRT-LM, MTP", manifest.num_draft_tokens)):
        on_run(runner)
        run = run_stock(msgspec.structs.replace(plain, use_mtp=k > 0))
        results.append(stock_result(run, k, reference.prompt_ids, reference.traces, reference.pieces, tolerance))
        if chats:
            rows = zip(chats.chats, chats.turns, run.chats, run.chat_errors, strict=True)
            comparisons = [compare_stock_chat(session, *row, tolerance=tolerance) for row in rows]
            results.append(_untimed("LiteRT-LM chats", k, comparisons, tolerance))
    return results, metadata_differences(read_metadata(container), expected)


def _untimed(runner: str, k: int, comparisons: Sequence[Comparison], tolerance: float) -> RunnerResult:
    return RunnerResult(
        runner=runner,
        num_draft_tokens=k,
        tokens_per_second=None,
        acceptance_rate=None,
        committed_per_round=None,
        comparisons=tuple(comparisons),
        tolerance=tolerance,
    )
