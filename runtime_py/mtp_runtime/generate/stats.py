"""The cost of a generation, how its drafts fared, and the same figures over several generations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec


class GenerationStats(msgspec.Struct, kw_only=True):
    """Counters and times of one generation; the loop fills them in as it goes.

    A round is one draft-and-verify cycle; a pass over one token without drafts is a decode step and no round.
    `reused_tokens` of the prompt were in the cache already, and were not processed.
    `drafted_at[i]` and `accepted_at[i]` count the rounds that proposed, and kept, the draft at position i.
    The phases do not overlap: `embed_ms` is the time of looking up embeddings, in any phase. The time that the caller
    spends between two tokens is in none of them.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    committed_tokens: int = 0
    decode_steps: int = 0
    rounds: int = 0
    round_tokens: int = 0
    drafted_at: list[int] = msgspec.field(default_factory=list)
    accepted_at: list[int] = msgspec.field(default_factory=list)
    embed_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    accept_ms: float = 0.0
    prompt_wall_ms: float = 0.0
    generate_wall_ms: float = 0.0

    @property
    def drafted(self) -> int:
        """Return the number of drafts proposed."""
        return sum(self.drafted_at)

    @property
    def accepted(self) -> int:
        """Return the number of drafts kept."""
        return sum(self.accepted_at)

    @property
    def rounds_by_num_drafts(self) -> list[int]:
        """Return how often so many drafts were proposed: the decode steps first, then rounds of one draft, of two, …"""
        at_least = [*self.drafted_at, 0]
        exactly = [more - fewer for more, fewer in itertools.pairwise(at_least)]
        return [self.decode_steps, *exactly]

    @property
    def acceptance_rate(self) -> float:
        """Return the kept drafts per proposed draft; 0 without drafts."""
        return overall_acceptance_rate([self]) or 0.0

    @property
    def committed_per_round(self) -> float:
        """Return the tokens of a round on average, counting those cut off by a stop or a limit; 0 without rounds."""
        return overall_committed_per_round([self]) or 0.0

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens per second after the first one, which the prompt's pass yields."""
        return overall_tokens_per_second([self]) or 0.0

    def count_round(self, drafted: int, accepted: int) -> None:
        """Count a round of `drafted` proposals of which the first `accepted` were kept."""
        self.rounds += 1
        self.round_tokens += accepted + 1
        while len(self.drafted_at) < drafted:
            self.drafted_at.append(0)
            self.accepted_at.append(0)
        for position in range(drafted):
            self.drafted_at[position] += 1
        for position in range(accepted):
            self.accepted_at[position] += 1

    def summary(self) -> dict[str, float]:
        """Return the derived figures: rates per draft, per round and per second."""
        return {
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "committed_per_round": self.committed_per_round,
            "tokens_per_second": self.tokens_per_second,
        }


def overall_acceptance_rate(runs: Sequence[GenerationStats]) -> float | None:
    """Return the kept drafts of several generations per proposed draft; None without drafts."""
    drafted = sum(run.drafted for run in runs)
    return sum(run.accepted for run in runs) / drafted if drafted else None


def overall_committed_per_round(runs: Sequence[GenerationStats]) -> float | None:
    """Return the tokens that a round of several generations yielded on average, counting those cut off by a stop or a
    limit; None without rounds."""
    rounds = sum(run.rounds for run in runs)
    return sum(run.round_tokens for run in runs) / rounds if rounds else None


def overall_tokens_per_second(runs: Sequence[GenerationStats]) -> float | None:
    """Return the tokens per second of several generations, each without its first token, which the prompt's pass
    yields; None if no time was spent on others."""
    wall_ms = sum(run.generate_wall_ms for run in runs)
    later = sum(max(0, run.committed_tokens - 1) for run in runs)
    return 1000.0 * later / wall_ms if wall_ms > 0 else None
