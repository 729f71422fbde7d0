"""What a generation cost and how its drafts fared."""

from __future__ import annotations

import itertools

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
        """Drafts proposed."""
        return sum(self.drafted_at)

    @property
    def accepted(self) -> int:
        """Drafts kept."""
        return sum(self.accepted_at)

    @property
    def rounds_by_num_drafts(self) -> list[int]:
        """How often so many drafts were proposed: the decode steps first, then rounds of one draft, of two, …"""
        at_least = [*self.drafted_at, 0]
        exactly = [more - fewer for more, fewer in itertools.pairwise(at_least)]
        return [self.decode_steps, *exactly]

    @property
    def acceptance_rate(self) -> float:
        """Kept drafts per proposed draft; 0 without drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def committed_per_round(self) -> float:
        """Tokens that a round yielded on average, counting those cut off by a stop or a limit; 0 without rounds."""
        return self.round_tokens / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second after the first one, which the prompt's pass yields."""
        later = self.committed_tokens - 1
        return 1000.0 * later / self.generate_wall_ms if later > 0 and self.generate_wall_ms > 0 else 0.0

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
