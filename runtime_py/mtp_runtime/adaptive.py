"""How many tokens to draft in the next round, from what drafts brought and what passes cost so far.

A round of K drafts commits 1 + a1 + a1 a2 + … + a1 … aK tokens on average, where ai is the chance that the draft at
position i is kept once those before it were, and takes K drafter passes and one target pass over K + 1 tokens
(Leviathan et al. 2023, section 3.3, with a rate for every position and measured times). The K that commits most tokens
per millisecond is taken; K = 0 is plain decoding. The output is the same whatever is taken.
"""

from __future__ import annotations

from collections import deque

# What was seen n rounds ago counts MEMORY**n: the last 40 rounds or so decide.
MEMORY = 0.975
# Positions that a round did not reach forget slower, so that few rounds go on finding out what is known.
UNREACHED_MEMORY = 0.995
# A rate without evidence is that of the position before it, as firmly as so many rounds would say.
PRIOR_ROUNDS = 2.0
PRIOR_RATE = 0.8
# A cost is the lower quartile of so many measurements: other programs make a pass slower, never faster. A cost that was
# measured in a quieter time still looks cheap. It is not believed before it has the fewest, and is measured afresh when
# so many rounds have passed without one.
MOST_MEASUREMENTS = 24
FEWEST_MEASUREMENTS = 3
STALE_ROUNDS = 1024
# Part of the time of plain decoding that may be lost on rounds that only look whether drafts would pay again.
PROBE_SHARE = 0.02


class _Cost:
    """The usual time of one kind of pass, in spite of a few slow ones."""

    def __init__(self) -> None:
        self.usual_ms: float | None = None
        self.measured_in_round = 0
        self._measured: deque[float] = deque(maxlen=MOST_MEASUREMENTS)

    def add(self, measured_ms: float, number: int) -> None:
        if number - self.measured_in_round > STALE_ROUNDS:
            self._measured.clear()
        self.measured_in_round = number
        self._measured.append(measured_ms)
        enough = len(self._measured) >= FEWEST_MEASUREMENTS
        self.usual_ms = sorted(self._measured)[len(self._measured) // 4] if enough else None

    def known_ms(self, number: int) -> float | None:
        return self.usual_ms if number - self.measured_in_round <= STALE_ROUNDS else None


class AdaptiveDepth:
    """Chooses K for each round, and is told how the round went.

    It is deterministic: the times are given to it. Costs and rates stay from one generation to the next.
    """

    def __init__(self, num_draft_tokens: int) -> None:
        """Choose from 0 to `num_draft_tokens`."""
        self._limit = num_draft_tokens
        self._number = 0
        self._draft = _Cost()
        self._passes = [_Cost() for _ in range(num_draft_tokens + 1)]  # by K; 0 is a decode step
        self._seen = [0.0] * num_draft_tokens
        self._kept = [0.0] * num_draft_tokens
        self._plain = False
        self._debt_ms = 0.0

    def choose(self, limit: int) -> int:
        """Return K for the next round, at most `limit`."""
        limit = min(limit, self._limit)
        if self._passes[0].known_ms(self._number) is None:
            return 0  # everything is compared with it
        best = self._best(limit, self._expected())
        self._plain = best == 0
        if self._plain and self._debt_ms <= 0.0:
            # As deep as would be best if nearly all were kept: it tells most, and brings most if text became easy.
            return self._best(limit, [PRIOR_RATE**k for k in range(1, self._limit + 1)])
        return best

    def observe(self, num_drafts: int, accepted: int, *, draft_ms: float, total_ms: float) -> None:
        """Learn from a round of `num_drafts`, of which the first `accepted` were kept.

        `draft_ms` is what its drafts took together, `total_ms` the whole round; without drafts it is a decode step.
        """
        self._number += 1
        self._passes[num_drafts].add(total_ms - draft_ms, self._number)
        if num_drafts:
            self._draft.add(draft_ms / num_drafts, self._number)
            self._count(num_drafts, accepted)
        decode_ms = self._passes[0].known_ms(self._number)
        if decode_ms is None or not self._plain:
            return
        # In plain decoding: what a round lost against it is paid back by the steps after it.
        if num_drafts:
            self._debt_ms += self._round_ms(num_drafts) - (accepted + 1) * decode_ms
        else:
            self._debt_ms -= PROBE_SHARE * decode_ms
        self._debt_ms = max(self._debt_ms, 0.0)

    def _count(self, num_drafts: int, accepted: int) -> None:
        reached = min(accepted + 1, num_drafts)
        for i in range(self._limit):
            memory = MEMORY if i < reached else UNREACHED_MEMORY
            self._seen[i] = memory * self._seen[i] + (i < reached)
            self._kept[i] = memory * self._kept[i] + (i < accepted)

    def _expected(self) -> list[float]:
        """The chance of each position that a draft there is kept, and all before it."""
        rate, together, chances = PRIOR_RATE, 1.0, []
        for seen, kept in zip(self._seen, self._kept, strict=True):
            rate = (kept + PRIOR_ROUNDS * rate) / (seen + PRIOR_ROUNDS)
            together *= rate
            chances.append(together)
        return chances

    def _best(self, limit: int, chances: list[float]) -> int:
        """The K that commits most tokens per millisecond if drafts are kept with these chances."""
        best, best_speed, tokens = 0, 0.0, 1.0
        for k in range(limit + 1):
            if k:
                tokens += chances[k - 1]
            time_ms = self._round_ms(k)
            speed = tokens / time_ms if time_ms > 0.0 else float("inf")
            if speed > best_speed:
                best, best_speed = k, speed
        return best

    def _round_ms(self, num_drafts: int) -> float:
        """What a round takes. What is not measured is taken to be as cheap as it can be: trying it tells."""
        pass_ms = 0.0
        for cost in reversed(self._passes[: num_drafts + 1]):
            known = cost.known_ms(self._number)
            if known is not None:
                pass_ms = known  # a pass over more tokens takes no less
                break
        return pass_ms + num_drafts * (self._draft.known_ms(self._number) or 0.0)
