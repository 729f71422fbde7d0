"""The acceptance of drafts by kind of prompt, K and position; the costs of passes; the speed-up of both. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from mtp_export.check.prompts import Prompt, text_of
from mtp_runtime import GenerationStats, GenerationTrace, Session
from mtp_runtime.errors import UserError
from mtp_runtime.generate.stats import overall_committed_per_round, overall_tokens_per_second
from mtp_runtime.measure import timing
from mtp_runtime.measure.profile import Profile


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """What a decode step takes, a round of K drafts by K, and one draft where it was timed alone; all in ms."""

    decode_ms: float
    rounds_ms: Mapping[int, float]
    draft_ms: float | None = None

    def expected_speed_up(self, committed_per_round: float, k: int) -> float:
        """Return the speed against plain decoding, for rounds of K drafts that commit so many tokens."""
        return committed_per_round * self.decode_ms / self.rounds_ms[k]

    def break_even(self, k: int) -> float | None:
        """Return the acceptance of each draft, given those before it, from which K drafts pay; None if they never
        do."""
        return timing.break_even(self.decode_ms, self.rounds_ms[k], k)


def read_bench(path: Path, model: str) -> tuple[str, Costs]:
    """Return a device's name and costs, from what `bench --json` or `device bench --json` of mtp-export printed there.

    Raises:
        UserError: the file is no such JSON, is of another model than `model`, or has no times.
    """
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
        rounds_ms = profile.rounds_ms
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read a device's times from {path} ({error}): give what mtp-export bench --json, or mtp-export "
            "device bench --json, printed there"
        ) from error
    if profile.model != model:
        raise UserError(
            f"{path} has the times of {profile.model}, expected {model}: bench a bundle of it on that device"
        )
    medians = profile.medians_ms
    if "decode" not in medians:
        raise UserError(f"{path} has no times, as of an emulated place: run mtp-export device bench on a phone")
    if not rounds_ms:
        raise UserError(
            f"{path} has no times of rounds, because the runtime logged no acceptance: take a LiteRT-LM that does"
        )
    return profile.machine, Costs(decode_ms=medians["decode"], rounds_ms=rounds_ms, draft_ms=medians.get("draft"))


class KindRow(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of prompt with one K. `accepted_at`: share of rounds that keep the draft at each position. `speed_up` is
    measured: committed tokens per second against plain decoding of the same prompts."""

    kind: str
    num_draft_tokens: int
    rounds: int
    accepted_at: tuple[float, ...]
    committed_per_round: float
    speed_up: float


def measure_acceptance(
    session: Session, prompts: Sequence[Prompt], *, max_new_tokens: int, on_prompt: Callable[[str], None]
) -> tuple[list[KindRow], Costs, list[tuple[Prompt, GenerationTrace]]]:
    """Generate for every prompt with every K in turn.

    Returns:
        A row for each kind and K, the costs on this machine, and the traces with the bundle's own K.
    """
    depths = range(session.manifest.num_draft_tokens + 1)
    stats: dict[tuple[str, int], list[GenerationStats]] = {}
    examples = []
    for k in depths:  # the first run of a graph packs its weights
        session.generate(text_of(session, prompts[0]), max_new_tokens=4, num_draft_tokens=k).finish()
    for number, prompt in enumerate(prompts, 1):
        on_prompt(f"prompt {number} of {len(prompts)}")
        text = text_of(session, prompt)
        for k in depths:
            trace = session.generate(text, max_new_tokens=max_new_tokens, num_draft_tokens=k).finish()
            stats.setdefault((prompt.kind, k), []).append(trace.stats)
        examples.append((prompt, trace))
    kinds = list(dict.fromkeys(prompt.kind for prompt in prompts))
    rows = [_row(kind, k, stats[kind, k], stats[kind, 0]) for kind in kinds for k in depths[1:]]
    return rows, _costs(stats, depths), examples


def _costs(stats: dict[tuple[str, int], list[GenerationStats]], depths: Sequence[int]) -> Costs:
    by_depth = {k: [s for (_, depth), runs in stats.items() if depth == k for s in runs] for k in depths}
    plain, deepest = by_depth[0], by_depth[depths[-1]]
    draft_ms = sum(s.draft_ms for s in deepest) / max(1, sum(s.drafted for s in deepest))
    verify_ms = {k: sum(s.verify_ms for s in by_depth[k]) / max(1, sum(s.rounds for s in by_depth[k])) for k in depths}
    return Costs(
        decode_ms=sum(s.decode_ms for s in plain) / sum(s.decode_steps for s in plain),
        rounds_ms={k: k * draft_ms + verify_ms[k] for k in depths[1:]},
        draft_ms=draft_ms,
    )


def _row(kind: str, k: int, runs: Sequence[GenerationStats], plain: Sequence[GenerationStats]) -> KindRow:
    drafted = [sum(s.drafted_at[i] for s in runs if len(s.drafted_at) > i) for i in range(k)]
    kept = [sum(s.accepted_at[i] for s in runs if len(s.accepted_at) > i) for i in range(k)]
    rounds = sum(s.rounds for s in runs)
    return KindRow(
        kind=kind,
        num_draft_tokens=k,
        rounds=rounds,
        accepted_at=tuple(a / d if d else 0.0 for a, d in zip(kept, drafted, strict=True)),
        committed_per_round=overall_committed_per_round(runs) or 0.0,
        speed_up=_speed(runs) / _speed(plain) if _speed(plain) else 0.0,
    )


def _speed(runs: Sequence[GenerationStats]) -> float:
    return overall_tokens_per_second(runs) or 0.0


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """The speed-up against plain decoding that a kind of prompt is to have with one K."""

    kind: str
    num_draft_tokens: int
    speed_up: float


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """The gain of drafts on one device, by the costs there. `break_even` is, by K, the acceptance from which K drafts
    pay."""

    name: str
    costs: Costs
    break_even: Mapping[int, float | None]
    expected: tuple[Expected, ...]
    advice: str


def on_device(name: str, costs: Costs, rows: Sequence[KindRow]) -> Device:
    """Return for which kinds drafts pay on a device, and with which K, of those whose rounds were timed there."""
    expected = [
        Expected(kind=row.kind, num_draft_tokens=k, speed_up=costs.expected_speed_up(row.committed_per_round, k))
        for row in rows
        if (k := row.num_draft_tokens) in costs.rounds_ms
    ]
    best: dict[str, Expected] = {}
    for one in expected:
        best[one.kind] = max(best.get(one.kind, one), one, key=lambda each: each.speed_up)
    pays = [
        f"{one.kind} (K = {one.num_draft_tokens}, {one.speed_up:.2f} times plain)"
        for one in best.values()
        if one.speed_up > 1
    ]
    not_so = [one.kind for one in best.values() if one.speed_up <= 1]
    advice = f"drafts pay for {', '.join(pays)}" if pays else "drafts pay for nothing that was tried"
    return Device(
        name=name,
        costs=costs,
        break_even={k: costs.break_even(k) for k in costs.rounds_ms},
        expected=tuple(expected),
        advice=f"{advice}; not for {', '.join(not_so)}" if pays and not_so else advice,
    )
