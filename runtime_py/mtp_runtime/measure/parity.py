"""Parity: whether two runtimes generate the same tokens, and if not, whether the difference is a near-tie.

The one rule: a difference is a stated near-tie if and only if, at the first differing position, the reference's top
two logits are within the tolerance. Other kernels (of another library or processor) round differently in the last bits;
where the two best tokens are that close, either is right. Where bits are equal the tolerance is 0. The text after the
first difference continues another text and is not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

Verdict = Literal["equal", "near_tie", "different"]


class Comparison(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt's output, compared with the reference's.

    `agreed` leading tokens of the `compared` ones are equal; `first_difference` is the position of the next, and
    `margin` the reference's top-1 minus top-2 logit there (None where it had already ended). Of a chat, replies are
    counted instead of tokens, and `detail` says what is different, or where the comparison of equal replies ended.
    """

    prompt: str
    compared: int
    agreed: int
    first_difference: int | None
    margin: float | None
    verdict: Verdict
    detail: str = ""


class RunnerResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one way of running the bundle fared over all prompts.

    `acceptance_rate` and `committed_per_round` are None where there are no drafts or the runtime does not report them;
    `tokens_per_second` is None where it did not generate step by step. `tolerance` is in logits: 0 where the bits must
    be those of the reference, None for the report's.
    """

    runner: str
    num_draft_tokens: int
    tokens_per_second: float | None
    acceptance_rate: float | None
    committed_per_round: float | None
    comparisons: tuple[Comparison, ...]
    tolerance: float | None = None

    def count(self, verdict: Verdict) -> int:
        """Return how many prompts got `verdict`."""
        return sum(comparison.verdict == verdict for comparison in self.comparisons)


class ParityReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every runner against the reference.

    `tolerance`, in logits, is that of runners on other kernels than the reference's. `left_out` has the runners that
    were not run, and why; `findings` the differences of the container from its bundle; `notes` the known faults of a
    runtime.
    """

    model: str
    recipe: str
    reference: str
    tolerance: float
    max_new_tokens: int
    results: tuple[RunnerResult, ...]
    left_out: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Return whether every difference is a near-tie, and the container has no other fault."""
        return not self.findings and all(result.count("different") == 0 for result in self.results)

    def to_json(self) -> str:
        """Serialise, with `passed` spelled out."""
        document = {"passed": self.passed, **msgspec.to_builtins(self)}
        return msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n"

    def to_markdown(self) -> str:
        """Return a table of the runners and a list of every difference."""
        lines = [
            f"# Parity of {self.model}, recipe {self.recipe}: {'passed' if self.passed else 'FAILED'}",
            "",
            f"Reference: {self.reference}; {self.max_new_tokens} tokens per prompt. A difference is a near-tie if the "
            "reference's top two logits are within the runner's tolerance at the first differing position; a tolerance "
            "of 0 means equal bits.",
            "",
            "| runner | K | tolerance | equal | near-ties | different | tokens agreed | acceptance "
            "| committed per round | tok/s |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(_row(result, self.tolerance) for result in self.results),
        ]
        differences = [
            f"- {result.runner}, K = {result.num_draft_tokens}, {comparison.prompt}: "
            f"{comparison.detail or _place(comparison)}: {comparison.verdict.replace('_', '-')}"
            for result in self.results
            for comparison in result.comparisons
            if comparison.verdict != "equal"
        ]
        if self.findings:
            lines += ["", "## The container", "", *(f"- {finding}" for finding in self.findings)]
        if self.notes:
            lines += ["", "## Known of the runtimes", "", *(f"- {note}" for note in self.notes)]
        if self.left_out:
            lines += ["", "## Left out", "", *(f"- {reason}" for reason in self.left_out)]
        if differences:
            lines += ["", "## Differences", "", *differences]
        return "\n".join(lines) + "\n"


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many leading items of two sequences (tokens, characters, …) are equal: where they first differ."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def common_pieces(pieces: Sequence[str], text: str) -> int:
    """Return how many leading `pieces`, joined, are the beginning of `text`: which of them first differs."""
    start = 0
    for index, piece in enumerate(pieces):
        if not text.startswith(piece, start):
            return index
        start += len(piece)
    return len(pieces)


def compare_tokens(
    prompt: str,
    reference: Sequence[int],
    tokens: Sequence[int],
    *,
    margins: Sequence[float],
    tolerance: float,
    max_new_tokens: int,
) -> Comparison:
    """Compare the first `max_new_tokens` of two outputs; one that ends earlier differs where it ends.

    `margins` are the reference's, one per token.

    Raises:
        ValueError: a reference token has no margin.
    """
    reference, tokens = reference[:max_new_tokens], tokens[:max_new_tokens]
    agreed = common_length(reference, tokens)
    return _judge(prompt, agreed, max(len(reference), len(tokens)), len(reference), margins, tolerance)


def compare_text(
    prompt: str,
    pieces: Sequence[str],
    text: str,
    *,
    margins: Sequence[float],
    tolerance: float,
) -> Comparison:
    """Compare the reference, as the text that each of its tokens adds, with another runtime's whole `text`.

    For runtimes that give no token ids. `text` may go on after the reference's end: stock LiteRT-LM commits its last
    round whole, up to K tokens more than it was asked for.

    Raises:
        ValueError: a reference token has no margin.
    """
    return _judge(prompt, common_pieces(pieces, text), len(pieces), len(pieces), margins, tolerance)


def _judge(
    prompt: str, agreed: int, compared: int, reference_length: int, margins: Sequence[float], tolerance: float
) -> Comparison:
    if len(margins) < reference_length:
        raise ValueError(f"{reference_length} reference tokens have {len(margins)} margins")
    if agreed == compared:
        return Comparison(
            prompt=prompt, compared=compared, agreed=agreed, first_difference=None, margin=None, verdict="equal"
        )
    margin = margins[agreed] if agreed < reference_length else None
    return Comparison(
        prompt=prompt,
        compared=compared,
        agreed=agreed,
        first_difference=agreed,
        margin=margin,
        verdict="near_tie" if margin is not None and margin <= tolerance else "different",
    )


def _row(result: RunnerResult, tolerance: float) -> str:
    tolerance = tolerance if result.tolerance is None else result.tolerance
    agreed = sum(comparison.agreed for comparison in result.comparisons)
    compared = sum(comparison.compared for comparison in result.comparisons)
    acceptance = "–" if result.acceptance_rate is None else f"{result.acceptance_rate:.3f}"
    per_round = "–" if result.committed_per_round is None else f"{result.committed_per_round:.2f}"
    return (
        f"| {result.runner} | {result.num_draft_tokens or '–'} | {tolerance:g} "
        f"| {result.count('equal')} | {result.count('near_tie')} "
        f"| {result.count('different')} | {agreed} of {compared} | {acceptance} | {per_round} "
        f"| {'–' if result.tokens_per_second is None else format(result.tokens_per_second, '.0f')} |"
    )


def _place(comparison: Comparison) -> str:
    return f"token {comparison.first_difference}, {_margin(comparison)}"


def _margin(comparison: Comparison) -> str:
    return "where the reference had ended" if comparison.margin is None else f"margin {comparison.margin:.2g}"
