"""Adaptive K against simulated machines and texts, where the best K is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_runtime.generate.adaptive import AdaptiveDepth

K = 4
EASY, MIDDLING, FALLING, HOSTILE = [0.9] * K, [0.6] * K, [0.75, 0.5, 0.3, 0.1], [0.03] * K
DRAFT_MS = 0.12
# Time of a target pass over n tokens where a decode step takes 1 ms; the first two are of padded passes.
MACHINES: dict[str, Callable[[int], float]] = {
    "padded": lambda n: 1.2,
    "padded, dear": lambda n: 1.8,
    "growing": lambda n: 1.0 + 0.15 * (n - 1),
    "steep": lambda n: 0.9 * n,
}


class Simulation:
    """A machine and a text: counts the true time, and tells it with noise and rare outliers.

    `after_drafts` is what the first decode step after drafts takes, where those after it take 1 ms.
    """

    def __init__(self, verify: Callable[[int], float], *, seed: int = 0, after_drafts: float = 1.0) -> None:
        self.depth = AdaptiveDepth(K)
        self.chosen: list[int] = []
        self.time_ms = 0.0
        self.committed = 0
        self.verify = verify
        self._after_drafts = after_drafts
        self._random = random.Random(seed)

    def run(self, rates: Sequence[float], count: int, *, fixed: int | None = None, limit: int = K) -> float:
        """Commit `count` tokens of a text; returns what that took, in ms."""
        start_ms, stop = self.time_ms, self.committed + count
        while self.committed < stop:
            k = self.depth.choose(limit) if fixed is None else fixed
            accepted = 0
            while accepted < k and self._random.random() < rates[accepted]:
                accepted += 1
            draft_ms, pass_ms = DRAFT_MS * k, self.verify(k + 1) if k else 1.0
            if not k and self.chosen and self.chosen[-1]:
                pass_ms = self._after_drafts
            self.time_ms += draft_ms + pass_ms
            self.committed += accepted + 1
            self.chosen.append(k)
            if fixed is None:
                noisy_ms = self._noisy(draft_ms)
                self.depth.observe(k, accepted, draft_ms=noisy_ms, total_ms=noisy_ms + self._noisy(pass_ms))
        return self.time_ms - start_ms

    def _noisy(self, true_ms: float) -> float:
        return true_ms * self._random.lognormvariate(0.0, 0.1) * (30.0 if self._random.random() < 0.02 else 1.0)


def fixed_ms(machine: str, rates: Sequence[float], count: int) -> list[float]:
    """What `count` tokens take with each fixed K."""
    return [Simulation(MACHINES[machine], seed=9).run(rates, count, fixed=k) for k in range(K + 1)]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("rates", [EASY, MIDDLING, FALLING, HOSTILE], ids=["easy", "middling", "falling", "hostile"])
def test_adaptive_k_costs_little_more_than_the_best_k(machine: str, rates: Sequence[float]) -> None:
    """Finding out included; plain decoding is one of those that it is compared with."""
    fixed = fixed_ms(machine, rates, 5000)
    for seed in range(3):
        assert Simulation(MACHINES[machine], seed=seed).run(rates, 5000) < 1.05 * min(fixed)


@pytest.mark.parametrize(
    ("machine", "rates", "best"), [("padded", EASY, 4), ("padded, dear", HOSTILE, 0), ("growing", FALLING, 2)]
)
def test_it_settles_on_the_best_k(machine: str, rates: Sequence[float], best: int) -> None:
    run = Simulation(MACHINES[machine])
    fixed = fixed_ms(machine, rates, 5000)
    assert fixed.index(min(fixed)) == best
    run.run(rates, 1500)
    settled = len(run.chosen)
    run.run(rates, 3000)
    assert sum(abs(k - best) <= (best > 0) for k in run.chosen[settled:]) > 0.9 * len(run.chosen[settled:])


@pytest.mark.parametrize("machine", ["padded", "padded, dear", "growing"])
def test_it_notices_when_the_text_changes_and_changes_back(machine: str) -> None:
    run = Simulation(MACHINES[machine], seed=3)
    easy_ms, hostile_ms = min(fixed_ms(machine, EASY, 1000)), min(fixed_ms(machine, HOSTILE, 1000))
    hostile_times_ms, easy_times_ms = [], []
    for _ in range(3):
        run.run(HOSTILE, 300)
        hostile_times_ms.append(run.run(HOSTILE, 1000))
        run.run(EASY, 300)
        easy_times_ms.append(run.run(EASY, 1000))
    assert sum(hostile_times_ms) < 3 * 1.03 * hostile_ms
    assert sum(easy_times_ms) < 3 * 1.03 * easy_ms


def test_the_depth_follows_the_text() -> None:
    run = Simulation(MACHINES["growing"])
    run.run(EASY, 5000)
    assert sum(run.chosen[-50:]) > 3.4 * 50
    run.run(FALLING, 500)
    settled = len(run.chosen)
    run.run(FALLING, 500)
    assert sum(run.chosen[settled:]) < 2.6 * len(run.chosen[settled:])


@pytest.mark.parametrize("machine", MACHINES)
def test_looking_again_costs_little(machine: str) -> None:
    """Text for which no draft is ever right: what is lost against plain decoding, once that is known, is probes."""
    run = Simulation(MACHINES[machine])
    run.run([0.0] * K, 300)
    assert run.run([0.0] * K, 5000) < 1.03 * 5000
    assert sum(k > 0 for k in run.chosen[300:]) > 10, "it would never see that drafts pay again"


def test_a_slow_start_and_outliers_do_not_mislead() -> None:
    """The first pass of each kind binds its signature: it may take a hundred times as long."""
    depth, seen = AdaptiveDepth(K), set()
    for _ in range(60):
        k = depth.choose(K)
        slow = 1.0 if k in seen else 100.0
        seen.add(k)
        draft_ms = 0.1 * k * slow
        depth.observe(k, k, draft_ms=draft_ms, total_ms=draft_ms + (1.2 if k else 1.0) * slow)
    assert depth.choose(K) == K


def test_a_machine_that_changes_is_measured_again() -> None:
    run = Simulation(MACHINES["steep"])
    run.run(MIDDLING, 3000)
    run.verify = MACHINES["padded"]
    run.run(MIDDLING, 3000)
    assert run.run(MIDDLING, 3000) < 1.05 * min(fixed_ms("padded", MIDDLING, 3000))


def test_decode_steps_after_drafts_do_not_make_plain_decoding_look_dear() -> None:
    """Where drafts pay, the only decode steps are those that end a generation, and they are slow ones."""
    run = Simulation(MACHINES["padded, dear"], after_drafts=1.7)
    for _ in range(60):
        run.run(EASY, 30)
        run.run(EASY, 1, limit=0)
    for _ in range(2):
        start_ms, start = run.time_ms, run.committed
        for _ in range(60):
            run.run([0.55, 0.4, 0.3, 0.2], 30)
            run.run(EASY, 1, limit=0)
    assert run.time_ms - start_ms < 1.05 * (run.committed - start)


@pytest.mark.parametrize("kept_rounds", [0, 1, 2, 5])
@pytest.mark.parametrize("machine", MACHINES)
def test_what_drafts_lose_is_bounded_whatever_the_text(machine: str, kept_rounds: int) -> None:
    """Drafts are kept until they are believed in, and wrong from then on, for as long as drafting goes on."""
    depth, time_ms, committed, drafted = AdaptiveDepth(K), 0.0, 0, 0
    while committed < 5000:
        k = depth.choose(K)
        drafted = drafted + 1 if k else 0
        accepted = k if drafted <= kept_rounds else 0
        draft_ms, pass_ms = DRAFT_MS * k, MACHINES[machine](k + 1) if k else 1.0
        depth.observe(k, accepted, draft_ms=draft_ms, total_ms=draft_ms + pass_ms)
        time_ms += draft_ms + pass_ms
        committed += accepted + 1
    assert time_ms < 1.03 * committed


@settings(deadline=None, max_examples=100)
@given(
    num_draft_tokens=st.integers(0, 6),
    rounds=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.floats(0, 1e6), st.floats(0, 1e6)), max_size=60),
)
def test_whatever_is_measured_k_stays_within_the_limit_and_repeats(
    num_draft_tokens: int, rounds: list[tuple[int, int, float, float]]
) -> None:
    one, other = AdaptiveDepth(num_draft_tokens), AdaptiveDepth(num_draft_tokens)
    for limit, accepted, draft_ms, pass_ms in rounds:
        k = one.choose(limit)
        assert k == other.choose(limit)
        assert 0 <= k <= min(limit, num_draft_tokens)
        for depth in (one, other):
            depth.observe(k, min(accepted, k), draft_ms=draft_ms * bool(k), total_ms=draft_ms * bool(k) + pass_ms)
