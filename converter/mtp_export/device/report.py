"""The report of a place: every check, its verdict, and the table that people read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from mtp_export.device.protocol import OfPlace, PlaceDescription, TraceRun
from mtp_runtime.measure.parity import Comparison, RunnerResult
from mtp_runtime.measure.teacher_forcing import Distances

Outcome = Literal["passed", "failed", "inconclusive"]
# What `device parity` ends with. 2 is the user's mistake, as for every command.
EXIT_CODES: dict[Outcome, int] = {"passed": 0, "failed": 1, "inconclusive": 3}


class Check(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way of running the bundle on the place, held against `reference`.

    `tolerance` is in logits: a difference where the reference's two best are no farther apart is a near-tie. With
    `distances`, the check was made by teacher forcing, and their median must be within the tolerance too.
    """

    reference: str
    tolerance: float
    result: RunnerResult
    distances: Distances | None = None

    @property
    def compared(self) -> int:
        """How many tokens were compared, over all prompts."""
        return sum(comparison.compared for comparison in self.result.comparisons)

    @property
    def outcome(self) -> Outcome:
        """Whether every difference is a near-tie; inconclusive where nothing was compared."""
        if self.result.count("different"):
            return "failed"
        if self.distances and self.distances.median is not None and self.distances.median > self.tolerance:
            return "failed"
        return "passed" if self.compared else "inconclusive"


class DeviceReport(OfPlace, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The checks of a bundle on a place, stamped with the bundle and with where it ran; `host` is this machine.

    `left_out` names what was not checked, and why. `traces` are those of the place. On an emulated one the times in
    them say nothing about a device.
    """

    bundle_sha256: str
    max_new_tokens: int
    host: PlaceDescription
    checks: tuple[Check, ...]
    left_out: tuple[str, ...]
    traces: tuple[TraceRun, ...]

    @property
    def outcome(self) -> Outcome:
        """Failed if a check is; passed only if every check compared something."""
        outcomes = {check.outcome for check in self.checks}
        if "failed" in outcomes:
            return "failed"
        return "passed" if outcomes == {"passed"} else "inconclusive"

    def to_json(self) -> str:
        """Serialise, with `outcome` spelled out, of the whole and of each check."""
        document = {"outcome": self.outcome, **msgspec.to_builtins(self)}
        for check, entry in zip(self.checks, document["checks"], strict=True):
            entry["outcome"] = check.outcome
        return msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n"

    def to_markdown(self) -> str:
        """Return a table of the checks, and lists of every difference and of what was left out."""
        place = self.place
        outcome = self.outcome if self.outcome != "failed" else "FAILED"
        lines = [
            f"# Parity on a device: {self.model}, recipe {self.recipe}: {outcome}",
            "",
            f"Ran on: {title(place)} ({place.machine}, {place.system}); bundle {self.bundle_sha256[:16]}…",
            "",
            f"Compared with: {title(self.host)}. {self.max_new_tokens} tokens per prompt. A difference is a near-tie "
            "if the reference's top two logits are within the tolerance where it begins.",
            "",
            "| runner | K | reference | tolerance | equal | near-ties | different | tokens agreed | acceptance "
            "| committed per round | tok/s |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *(_row(check) for check in self.checks),
        ]
        lines += _section("Logits of the same text", [text for check in self.checks for text in _distances(check)])
        lines += _section("Differences", [text for check in self.checks for text in _differences(check)])
        lines += _section("Inconclusive", [text for check in self.checks for text in _nothing_compared(check)])
        lines += _section("Left out", self.left_out)
        return "\n".join(lines) + "\n"


def title(place: PlaceDescription) -> str:
    """Name a place in a line; an emulated one never goes without the word."""
    if place.where == "arm64-emulated":
        return f"ARM64, emulated CPU, over adb: {place.cpu} by {place.emulator}"
    return f"{'a phone' if place.where == 'phone' else 'this machine'}: {place.cpu}"


def _section(heading: str, items: list[str] | tuple[str, ...]) -> list[str]:
    return ["", f"## {heading}", "", *(f"- {item}" for item in items)] if items else []


def _row(check: Check) -> str:
    result = check.result
    agreed = sum(comparison.agreed for comparison in result.comparisons)
    counts = " | ".join(str(result.count(verdict)) for verdict in ("equal", "near_tie", "different"))
    return (
        f"| {result.runner} | {result.num_draft_tokens or '–'} | {check.reference} | {check.tolerance:g} | {counts} "
        f"| {agreed} of {check.compared} | {_number(result.acceptance_rate, '.3f')} "
        f"| {_number(result.committed_per_round, '.2f')} | {_number(result.tokens_per_second, '.0f')} |"
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _distances(check: Check) -> Iterator[str]:
    measured = check.distances
    if measured is not None and measured.median is not None:
        yield (
            f"{measured.positions} positions: the logits of a position's best tokens differ by up to "
            f"{measured.median:.2g} (median), {measured.p99:.2g} (99th percentile), {measured.largest:.2g} (largest)"
            + (f": MORE THAN {check.tolerance:g} AT HALF OF THEM" if measured.median > check.tolerance else "")
        )


def _differences(check: Check) -> Iterator[str]:
    for comparison in check.result.comparisons:
        if comparison.verdict != "equal":
            yield (
                f"{_name(check)}, {comparison.prompt}: {_position(comparison)}: {comparison.verdict.replace('_', '-')}"
            )


def _nothing_compared(check: Check) -> Iterator[str]:
    if check.outcome == "inconclusive":
        yield f"{_name(check)}: no token was compared"


def _name(check: Check) -> str:
    drafts = f", K = {check.result.num_draft_tokens}" if check.result.num_draft_tokens else ""
    return f"{check.result.runner}{drafts}, against {check.reference}"


def _position(comparison: Comparison) -> str:
    margin = "after the reference's end" if comparison.margin is None else f"margin {comparison.margin:.2g}"
    return f"token {comparison.first_difference}, {margin}"
