"""How many tokens to draft in the next round, from the drafts that were kept and the times of passes so far.

A round of K drafts commits 1 + a1 + a1 a2 + … + a1 … aK tokens on average, where ai is the chance that the draft at
position i is kept once those before it were, and takes K drafter passes and one target pass over K + 1 tokens
(Leviathan et al. 2023, section 3.3, with a rate for every position and measured times). The K that commits most tokens
per millisecond is taken, as long as drafting can be afforded: every round's gain or loss against plain decoding goes to
an account, and while that is overdrawn no draft is made. So the loss by drafts is bounded, whatever the text is
like and whatever rates were assumed. The output does not depend on K.
"""

from __future__ import annotations

from collections import deque

# An observation n rounds ago counts MEMORY**n: the last 40 rounds or so decide.
MEMORY = 0.975
# A rate without evidence is that of the position before it, as firmly as after so many rounds.
PRIOR_ROUNDS = 2.0
PRIOR_RATE = 0.8
# A cost is the mean of so many measurements without the slowest quarter. Interruptions by other programs belong to it,
# since a long pass meets more of them than a short one: in a lower quartile, which is without them, plain decoding
# looked cheaper than it was. It is used once it has the fewest, and is measured afresh when so many rounds with drafts
# have passed without a measurement.
MOST_MEASUREMENTS = 24
FEWEST_MEASUREMENTS = 3
STALE_ROUNDS = 256
# The most that drafts may lose, in decode steps: this part of plain decoding's time, and past gains up to the most.
EARNED_SHARE = 0.015
MOST_CREDIT = 24.0


class _Cost:
    """The usual time of one kind of pass, in spite of a few slow ones."""

    def __init__(self) -> None:
        self._usual_ms: float | None = None
        self._measured_in_round = 0
        self._measured: deque[float] = deque(maxlen=MOST_MEASUREMENTS)

    def add(self, measured_ms: float, number: int) -> None:
        if number - self._measured_in_round > STALE_ROUNDS:
            self._measured.clear()
        self._measured_in_round = number
        self._measured.append(measured_ms)
        count = len(self._measured)
        usual = sorted(self._measured)[: count - count // 4]
        self._usual_ms = sum(usual) / len(usual) if count >= FEWEST_MEASUREMENTS else None

    def known_ms(self, number: int) -> float | None:
        return self._usual_ms if number - self._measured_in_round <= STALE_ROUNDS else None


class AdaptiveDepth:
    """Chooses K for each round, from how earlier rounds went.

    It is deterministic: the times are arguments. Costs and rates stay from one generation to the next.
    """

    def __init__(self, num_draft_tokens: int) -> None:
        """Choose from 0 to `num_draft_tokens`."""
        self._limit = num_draft_tokens
        self._number = 0  # of rounds with drafts: while there are none, no cost grows old
        self._drafted = False
        self._draft = _Cost()
        self._passes = [_Cost() for _ in range(num_draft_tokens + 1)]  # by K; 0 is a decode step
        self._seen = [0.0] * num_draft_tokens
        self._kept = [0.0] * num_draft_tokens
        self._credit = MOST_CREDIT

    def choose(self, limit: int) -> int:
        """Return K for the next round, at most `limit`."""
        if self._credit < 0.0 or self._passes[0].known_ms(self._number) is None:
            return 0
        return self._best(min(limit, self._limit))

    def observe(self, num_drafts: int, accepted: int, *, draft_ms: float, total_ms: float) -> None:
        """Learn from a round of `num_drafts`, of which the first `accepted` were kept.

        `draft_ms` is the time of all its drafts, `total_ms` that of the whole round, or of a decode step.
        """
        self._number += num_drafts > 0
        # The first decode step after drafts finds the processor's caches full of other weights, and takes up to 1.7
        # times as long as those after it: counted, it would make plain decoding look dear whenever drafts are made.
        if num_drafts or not self._drafted:
            self._passes[num_drafts].add(total_ms - draft_ms, self._number)
        self._drafted = num_drafts > 0
        if num_drafts:
            self._draft.add(draft_ms / num_drafts, self._number)
        for i in range(self._limit):
            self._seen[i] = MEMORY * self._seen[i] + (i <= accepted and i < num_drafts)
            self._kept[i] = MEMORY * self._kept[i] + (i < accepted)
        decode_ms = self._passes[0].known_ms(self._number)
        if decode_ms:
            gain = (1.0 + EARNED_SHARE) * (accepted + 1) - self._round_ms(num_drafts) / decode_ms
            self._credit = min(self._credit + gain, MOST_CREDIT)

    def _best(self, limit: int) -> int:
        """Return the K from 1 that commits most tokens per millisecond; 0 only if no draft may be made."""
        best, best_speed = 0, 0.0
        tokens, together, rate = 1.0, 1.0, PRIOR_RATE
        for k in range(1, limit + 1):
            rate = (self._kept[k - 1] + PRIOR_ROUNDS * rate) / (self._seen[k - 1] + PRIOR_ROUNDS)
            together *= rate
            tokens += together
            time_ms = self._round_ms(k)
            speed = tokens / time_ms if time_ms > 0.0 else float("inf")
            if speed > best_speed:
                best, best_speed = k, speed
        return best

    def _round_ms(self, num_drafts: int) -> float:
        """Return the time of a round. A pass without measurements counts as cheap as it can be, so that it is tried."""
        pass_ms = 0.0
        for cost in reversed(self._passes[: num_drafts + 1]):
            known = cost.known_ms(self._number)
            if known is not None:
                pass_ms = known  # a pass over more tokens takes no less
                break
        return pass_ms + num_drafts * (self._draft.known_ms(self._number) or 0.0)
