"""The proof of a bundle: the same prompts through every way of running it, compared token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mtp_calibration.corpus import Prompt
from mtp_export.stock_runtime import StockRun, run_stock
from mtp_runtime import GenerationTrace, Session
from mtp_runtime.errors import UserError
from mtp_runtime.parity import Comparison, ParityReport, RunnerResult, compare_text, compare_tokens

# In logits (soft-capped at ±30). Float graphs differ by reordered sums: some 1e-5. A quantised graph rounds its
# activations to int8, and a difference of 1e-6 before the rounding can be a step of one in 127 after it: differences
# of 1e-2 were measured between one-token and five-token passes of nano.
TOLERANCES = {"f32": 1e-3, "int8": 0.05, "int4": 0.05}


def prove(
    path: Path,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    threads: int,
    checkpoint: Path | None,
    stock: bool,
    on_run: Callable[[str], None] = lambda name: None,
) -> ParityReport:
    """Compare, against the reference runtime without MTP: itself with every K, transformers with `checkpoint` (float
    bundles only), and stock LiteRT-LM without and with MTP.

    Raises:
        MtpError: the bundle or a runtime fails.
    """
    with Session.open(path, threads=threads) as session:
        manifest = session.manifest
        on_run("reference runtime")
        plain = _run(session, prompts, max_new_tokens, 0)
        texts = [_pieces(session, trace) for trace in plain]
        tolerance = TOLERANCES[manifest.recipe]

        def compare(outputs: Sequence[Sequence[int]]) -> tuple[Comparison, ...]:
            return tuple(
                compare_tokens(
                    prompt.id,
                    trace.tokens,
                    output,
                    margins=trace.margins,
                    tolerance=tolerance,
                    max_new_tokens=max_new_tokens,
                )
                for prompt, trace, output in zip(prompts, plain, outputs, strict=True)
            )

        results = [_ours(plain, 0, compare([trace.tokens for trace in plain]))]
        for k in range(1, manifest.num_draft_tokens + 1):
            on_run(f"reference runtime, K = {k}")
            traces = _run(session, prompts, max_new_tokens, k)
            results.append(_ours(traces, k, compare([trace.tokens for trace in traces])))
        if checkpoint is not None and manifest.recipe == "f32":
            on_run("transformers")
            results.append(_transformers(checkpoint, plain, manifest.stop_token_ids, max_new_tokens, compare))
        if stock:
            container = session.bundle.path("litertlm") if path.is_dir() else path
            for use_mtp in (False, True):
                on_run("LiteRT-LM, MTP" if use_mtp else "LiteRT-LM")
                run = run_stock(
                    container,
                    [prompt.text for prompt in prompts],
                    max_new_tokens=max_new_tokens,
                    context_length=manifest.context_length,
                    use_mtp=use_mtp,
                    threads=threads,
                )
                drafts = manifest.num_draft_tokens if use_mtp else 0
                results.append(_stock(run, drafts, prompts, plain, texts, tolerance))
    return ParityReport(
        model=manifest.model,
        recipe=manifest.recipe,
        reference="the reference runtime without MTP",
        tolerance=tolerance,
        max_new_tokens=max_new_tokens,
        results=tuple(results),
    )


def _run(session: Session, prompts: Sequence[Prompt], max_new_tokens: int, k: int) -> list[GenerationTrace]:
    """Generate for every prompt; the plain run records margins, which cost it a little time."""
    traces = []
    for prompt in prompts:
        generation = session.generate(
            prompt.text, max_new_tokens=max_new_tokens, num_draft_tokens=k, with_margins=k == 0
        )
        traces.append(generation.finish())
        if not traces[-1].tokens:
            raise UserError(f"prompt {prompt.id} yields no token: it fills the whole context")
    return traces


def _pieces(session: Session, trace: GenerationTrace) -> list[str]:
    """The text that each token adds; a token that only completes a character adds it whole."""
    stream = session.text_stream()
    pieces = [stream.push(token) for token in trace.tokens]
    pieces[-1] += stream.finish()
    return pieces


def _ours(traces: Sequence[GenerationTrace], k: int, comparisons: tuple[Comparison, ...]) -> RunnerResult:
    stats = [trace.stats for trace in traces]
    drafted, rounds = sum(s.drafted for s in stats), sum(s.rounds for s in stats)
    wall_ms = sum(s.generate_wall_ms for s in stats)
    later = sum(max(0, s.committed_tokens - 1) for s in stats)
    return RunnerResult(
        runner="mtp_runtime",
        num_draft_tokens=k,
        tokens_per_second=1000.0 * later / wall_ms if wall_ms else 0.0,
        acceptance_rate=sum(s.accepted for s in stats) / drafted if drafted else None,
        committed_per_round=sum(s.round_tokens for s in stats) / rounds if rounds else None,
        comparisons=comparisons,
    )


def _transformers(
    checkpoint: Path,
    plain: Sequence[GenerationTrace],
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    compare: Callable[[Sequence[Sequence[int]]], tuple[Comparison, ...]],
) -> RunnerResult:
    from mtp_export.reference import greedy  # loads torch

    prompts = [trace.prompt_ids for trace in plain]
    outputs, seconds = greedy(checkpoint, prompts, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids)
    return RunnerResult(
        runner="transformers",
        num_draft_tokens=0,
        tokens_per_second=sum(map(len, outputs)) / seconds,
        acceptance_rate=None,
        committed_per_round=None,
        comparisons=compare(outputs),
    )


def _stock(
    run: StockRun,
    k: int,
    prompts: Sequence[Prompt],
    plain: Sequence[GenerationTrace],
    pieces: Sequence[Sequence[str]],
    tolerance: float,
) -> RunnerResult:
    comparisons = []
    for prompt, trace, parts, output in zip(prompts, plain, pieces, run.outputs, strict=True):
        if output.prompt_ids != list(trace.prompt_ids)[-len(output.prompt_ids) :]:
            raise UserError(f"prompt {prompt.id}: LiteRT-LM reads it as other tokens than we do: report this tokenizer")
        comparisons.append(compare_text(prompt.id, parts, output.text, margins=trace.margins, tolerance=tolerance))
    return RunnerResult(
        runner="LiteRT-LM",
        num_draft_tokens=k,
        tokens_per_second=run.tokens_per_second,
        acceptance_rate=run.acceptance_rate,
        committed_per_round=None if run.acceptance_rate is None else 1 + k * run.acceptance_rate,
        comparisons=tuple(comparisons),
    )
