"""The proof of a bundle: the same prompts and chats through every way of running it, compared token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from mtp_export.bundle.metadata import llm_metadata, metadata_differences
from mtp_export.check.chat_parity import ChatTurn, compare_stock_chat, compare_tokens_of_chat, hold
from mtp_export.check.chats import Chat, parity_chats
from mtp_export.check.prompts import Prompt, text_of
from mtp_export.check.stock_runtime import StockRun, known_faults, run_stock
from mtp_runtime import GenerationTrace, Session
from mtp_runtime.bundle.litertlm import read_metadata
from mtp_runtime.errors import ContextFullError, UserError
from mtp_runtime.measure.parity import Comparison, ParityReport, RunnerResult, compare_text, compare_tokens

# In logits (soft-capped at ±30). Float graphs differ by reordered sums: some 1e-5. A quantised graph rounds its
# activations to int8, and a difference of 1e-6 before the rounding can be a step of one in 127 after it: differences
# of 1e-2 were measured between one-token and five-token passes of nano.
TOLERANCES = {"f32": 1e-3, "int8": 0.05, "int4": 0.05}

_CHAT_TOKENS = 96  # of a reply
_MOST_CHAT_TOKENS = 2000
_SLOWEST_TOKEN_S = 1.0  # slower than this, stock LiteRT-LM is taken to hang


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
    bundles only), and stock LiteRT-LM without and with MTP. Where there is a chat template, chats too, in our
    Conversation, transformers and LiteRT-LM's.

    Raises:
        MtpError: the bundle or a runtime fails.
    """
    with Session.open(path, threads=threads) as session:
        manifest = session.manifest
        prompts = [msgspec.structs.replace(p, text=text_of(session, p), messages=()) for p in prompts]
        runs = _run(session, prompts, max_new_tokens, on_run)
        plain = runs[0]
        texts = [session.text_pieces(trace.tokens) for trace in plain]
        tolerance = tolerance_of(manifest.recipe)

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

        results = [_ours(traces, k, compare([trace.tokens for trace in traces])) for k, traces in enumerate(runs)]
        findings: list[str] = []
        chats, held, left_out = _reference_chats(session, on_run)
        if chats:
            results.append(_our_chats(session, chats, held, tolerance))
        if not stock:
            left_out.append("stock LiteRT-LM: --no-stock was given")
        elif not session.bundle.has("litertlm") and path.is_dir():
            stock = False
            left_out.append(f"stock LiteRT-LM: it runs .litertlm files, and this is {manifest.export_format}")
        if manifest.recipe != "f32":
            left_out.append(f"transformers: it runs float weights, and this bundle is {manifest.recipe}")
        elif checkpoint is None:
            left_out.append("transformers: name the checkpoint that the bundle was made from with --checkpoint")
        else:
            on_run("transformers")
            turns = [turn.trace for chat in held for turn in chat]
            outputs = _greedy(checkpoint, [*plain, *turns])
            results.append(_transformers("transformers", compare(outputs[: len(plain)])))
            if chats:
                of_chats, comparisons = iter(outputs[len(plain) :]), []
                for chat, reference in zip(chats, held, strict=True):
                    replies = [next(of_chats) for _ in reference]
                    comparisons.append(compare_tokens_of_chat(chat, reference, replies, tolerance=tolerance))
                results.append(_transformers("transformers chats", tuple(comparisons)))
        if stock:
            container = session.bundle.path("litertlm") if path.is_dir() else path
            expected = llm_metadata(session.bundle.path("tokenizer").parent, manifest)
            findings = metadata_differences(read_metadata(container), expected)
            bos = "" if expected.HasField("start_token") else session.tokenizer.bos_token
            for use_mtp in (False, True):
                on_run("LiteRT-LM, MTP" if use_mtp else "LiteRT-LM")
                run = run_stock(
                    container,
                    [bos + prompt.text for prompt in prompts],
                    max_new_tokens=max_new_tokens,
                    context_length=manifest.context_length,
                    use_mtp=use_mtp,
                    threads=threads,
                    timeout_s=300.0 + (len(prompts) * max_new_tokens + _MOST_CHAT_TOKENS) * _SLOWEST_TOKEN_S,
                    chats=chats,
                    max_chat_tokens=_CHAT_TOKENS,
                )
                drafts = manifest.num_draft_tokens if use_mtp else 0
                results.append(stock_result(run, drafts, [prompt.id for prompt in prompts], plain, texts, tolerance))
                if chats:
                    results.append(_stock_chats(session, run, drafts, chats, held, tolerance))
    return ParityReport(
        model=manifest.model,
        recipe=manifest.recipe,
        reference="the reference runtime without MTP",
        tolerance=tolerance,
        max_new_tokens=max_new_tokens,
        results=tuple(results),
        left_out=tuple(left_out),
        findings=tuple(findings),
        notes=tuple(note for note in (known_faults() if stock else None,) if note),
    )


def _reference_chats(
    session: Session, on_run: Callable[[str], None]
) -> tuple[list[Chat], list[list[ChatTurn]], list[str]]:
    """Hold parity's chats without drafts, where there is a chat template.

    Returns:
        The chats that fit the context, their turns, and a line for each chat that does not.
    """
    chats: list[Chat] = []
    held: list[list[ChatTurn]] = []
    left_out: list[str] = []
    for chat in parity_chats() if session.bundle.has("chat_template") else ():
        on_run(f"reference runtime, chat {chat.name}")
        try:
            held.append(hold(session, chat, max_new_tokens=_CHAT_TOKENS, num_draft_tokens=0))
            chats.append(chat)
        except ContextFullError:
            length = session.manifest.context_length
            left_out.append(f"chat {chat.name}: it does not fit the context of {length} tokens")
    return chats, held, left_out


def _our_chats(
    session: Session, chats: Sequence[Chat], held: Sequence[Sequence[ChatTurn]], tolerance: float
) -> RunnerResult:
    k, comparisons, traces = session.manifest.num_draft_tokens, [], []
    for chat, reference in zip(chats, held, strict=True):
        turns = hold(session, chat, max_new_tokens=_CHAT_TOKENS, num_draft_tokens=k)
        outputs = [turn.trace.tokens for turn in turns]
        comparisons.append(compare_tokens_of_chat(chat, reference, outputs, tolerance=tolerance))
        traces += [turn.trace for turn in turns]
    return msgspec.structs.replace(_ours(traces, k, tuple(comparisons)), runner="mtp_runtime chats")


def _stock_chats(
    session: Session,
    run: StockRun,
    k: int,
    chats: Sequence[Chat],
    held: Sequence[Sequence[ChatTurn]],
    tolerance: float,
) -> RunnerResult:
    rows = zip(chats, held, run.chats, run.chat_errors, strict=True)
    return RunnerResult(
        runner="LiteRT-LM chats",
        num_draft_tokens=k,
        tokens_per_second=None,
        acceptance_rate=None,
        committed_per_round=None,
        comparisons=tuple(compare_stock_chat(session, *row, tolerance=tolerance) for row in rows),
    )


def _run(
    session: Session, prompts: Sequence[Prompt], max_new_tokens: int, on_run: Callable[[str], None]
) -> list[list[GenerationTrace]]:
    """Generate for every prompt, plainly and with every K in turn, so that a machine that slows down slows all alike.

    Returns:
        Traces by K and prompt. Margins are recorded in the plain runs, which costs them a little time.
    """
    depths = range(session.manifest.num_draft_tokens + 1)
    for k in depths:  # the first run of a graph packs its weights
        session.generate(prompts[0].text, max_new_tokens=8, num_draft_tokens=k).finish()
    runs: list[list[GenerationTrace]] = [[] for _ in depths]
    for number, prompt in enumerate(prompts, 1):
        on_run(f"reference runtime, prompt {number} of {len(prompts)}")
        for k in depths:
            generation = session.generate(
                prompt.text, max_new_tokens=max_new_tokens, num_draft_tokens=k, with_margins=k == 0
            )
            runs[k].append(generation.finish())
            if not runs[k][-1].tokens:
                raise UserError(f"prompt {prompt.id} yields no token: it fills the whole context")
    return runs


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


def _greedy(checkpoint: Path, plain: Sequence[GenerationTrace]) -> list[list[int]]:
    from mtp_export.check.reference import greedy

    try:
        return greedy(checkpoint, [trace.prompt_ids for trace in plain], [trace.tokens for trace in plain])
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot load {checkpoint}: {error}") from error


def _transformers(runner: str, comparisons: tuple[Comparison, ...]) -> RunnerResult:
    return RunnerResult(
        runner=runner,
        num_draft_tokens=0,
        tokens_per_second=None,
        acceptance_rate=None,
        committed_per_round=None,
        comparisons=comparisons,
    )


def tolerance_of(recipe: str) -> float:
    """How far apart a recipe's two best logits may be for either to be right, in logits."""
    return TOLERANCES.get(recipe, max(TOLERANCES.values()))


def stock_result(
    run: StockRun,
    k: int,
    prompt_ids: Sequence[str],
    plain: Sequence[GenerationTrace],
    pieces: Sequence[Sequence[str]],
    tolerance: float,
) -> RunnerResult:
    """Judge stock LiteRT-LM's `run` by the reference's `plain` traces and the text that each of their tokens adds.

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
    )
