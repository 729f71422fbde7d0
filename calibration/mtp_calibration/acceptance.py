"""How drafts fare by kind of prompt, K and position, what passes cost here, and what speed-up that gives. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from mtp_calibration.corpus import Prompt
from mtp_calibration.observe import text_of
from mtp_runtime import GenerationStats, GenerationTrace, Session

_STEPS = 40  # of the bisection for the break-even acceptance: to the last bit of a float32


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of a decode step, of one draft, and of verify by K (from 1)."""

    decode_ms: float
    draft_ms: float
    verify_ms: tuple[float, ...]

    def expected_speed_up(self, committed_per_round: float, k: int) -> float:
        """Against plain decoding, for rounds of K drafts that commit so many tokens."""
        return committed_per_round * self.decode_ms / (k * self.draft_ms + self.verify_ms[k - 1])

    def break_even(self, k: int) -> float | None:
        """The acceptance of each draft, given those before it, from which K drafts pay; None if they never do."""
        if self.expected_speed_up(k + 1, k) <= 1:
            return None
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            pays = self.expected_speed_up(committed(middle, k), k) > 1
            low, high = (low, middle) if pays else (middle, high)
        return high


class KindRow(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of prompt with one K. `accepted_at`: share of rounds that keep the draft at each position. `speed_up` is
    measured: committed tokens per second against plain decoding of the same prompts."""

    kind: str
    num_draft_tokens: int
    rounds: int
    accepted_at: tuple[float, ...]
    committed_per_round: float
    speed_up: float
    expected_speed_up: float


def committed(acceptance: float, k: int) -> float:
    """Tokens of a round of K drafts, each accepted with this probability once those before it are (Leviathan et al.
    2023, arXiv 2211.17192, equation 1)."""
    return float(k + 1) if acceptance == 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


def measure_acceptance(
    session: Session, prompts: Sequence[Prompt], *, max_new_tokens: int, on_prompt: Callable[[str], None]
) -> tuple[list[KindRow], Costs, list[tuple[Prompt, GenerationTrace]]]:
    """Generate for every prompt with every K in turn; also returns the traces with the bundle's own K."""
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
    costs = _costs(stats, depths)
    kinds = list(dict.fromkeys(prompt.kind for prompt in prompts))
    rows = [_row(kind, k, stats[kind, k], stats[kind, 0], costs) for kind in kinds for k in depths[1:]]
    return rows, costs, examples


def _costs(stats: dict[tuple[str, int], list[GenerationStats]], depths: Sequence[int]) -> Costs:
    by_depth = {k: [s for (_, depth), runs in stats.items() if depth == k for s in runs] for k in depths}
    plain, deepest = by_depth[0], by_depth[depths[-1]]
    verify = [sum(s.verify_ms for s in by_depth[k]) / max(1, sum(s.rounds for s in by_depth[k])) for k in depths[1:]]
    return Costs(
        decode_ms=sum(s.decode_ms for s in plain) / sum(s.decode_steps for s in plain),
        draft_ms=sum(s.draft_ms for s in deepest) / max(1, sum(s.drafted for s in deepest)),
        verify_ms=tuple(verify),
    )


def _row(kind: str, k: int, runs: Sequence[GenerationStats], plain: Sequence[GenerationStats], costs: Costs) -> KindRow:
    drafted = [sum(s.drafted_at[i] for s in runs if len(s.drafted_at) > i) for i in range(k)]
    kept = [sum(s.accepted_at[i] for s in runs if len(s.accepted_at) > i) for i in range(k)]
    rounds = sum(s.rounds for s in runs)
    per_round = sum(s.round_tokens for s in runs) / max(1, rounds)
    return KindRow(
        kind=kind,
        num_draft_tokens=k,
        rounds=rounds,
        accepted_at=tuple(a / d if d else 0.0 for a, d in zip(kept, drafted, strict=True)),
        committed_per_round=per_round,
        speed_up=_speed(runs) / _speed(plain) if _speed(plain) else 0.0,
        expected_speed_up=costs.expected_speed_up(per_round, k),
    )


def _speed(runs: Sequence[GenerationStats]) -> float:
    wall_ms = sum(s.generate_wall_ms for s in runs)
    return 1000.0 * sum(max(0, s.committed_tokens - 1) for s in runs) / wall_ms if wall_ms else 0.0


def advice(rows: Sequence[KindRow]) -> str:
    """For which kinds drafts pay, and with which K, by the expected speed-up."""
    best: dict[str, KindRow] = {}
    for row in rows:
        if row.kind not in best or row.expected_speed_up > best[row.kind].expected_speed_up:
            best[row.kind] = row
    pays = [
        f"{kind} (K = {row.num_draft_tokens}, {row.expected_speed_up:.2f} times plain)"
        for kind, row in best.items()
        if row.expected_speed_up > 1
    ]
    not_so = [kind for kind, row in best.items() if row.expected_speed_up <= 1]
    said = f"drafts pay for {', '.join(pays)}" if pays else "drafts pay for nothing that was tried"
    return f"{said}; not for {', '.join(not_so)}" if pays and not_so else said
