"""Sampling with drafts: no rule about drafts changes the target's distribution, the penalty or the constraint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats as statistics

from mtp_runtime.backends.litert.static import StaticBackend
from mtp_runtime.errors import UserError
from mtp_runtime.generate.backend import Draft
from mtp_runtime.generate.loop import GenerationLoop, Request
from mtp_runtime.generate.sampling import (
    Chooser,
    Constraint,
    Method,
    Sampling,
    probabilities,
)
from mtp_runtime.generate.stats import GenerationStats
from mtp_runtime.generate.trace import Token
from tests.support.fake_backend import STOP, FakeBackend, fake_manifest
from tests.support.fake_backend import VOCAB as FAKE_VOCAB
from tests.support.toy_tables import VOCAB, TableBackend

pytestmark = pytest.mark.many_cases  # thousands of draws

DRAWS = 20_000
K = 3
# Some cut tokens that the drafter scores, some leave the drafter tokens that the target refuses.
SETTINGS = {
    "hot": {"temperature": 1.4},
    "cold, top-k": {"temperature": 0.5, "top_k": 3},
    "top-p": {"temperature": 1.0, "top_p": 0.7},
    "all": {"temperature": 0.8, "top_k": 5, "top_p": 0.9},
}
METHODS: tuple[Method, ...] = ("match", "speculative")


class Tables:
    """A random target, and a drafter that is like it to a degree and scores 6 of the 8 tokens."""

    def __init__(self) -> None:
        random = np.random.default_rng(7)
        self.target = random.normal(0.0, 1.3, (VOCAB, VOCAB, VOCAB)).astype(np.float32)
        noise = random.normal(0.0, 1.0, self.target.shape)
        self.drafter = (self.target + 0.5 * noise).astype(np.float32)
        self.candidates = np.stack([random.permutation(VOCAB)[:6] for _ in range(VOCAB)])

    def generate(
        self,
        sampling: Sampling | None,
        *,
        drafts: int,
        count: int = DRAWS,
        constraint: Constraint | None = None,
        stops: Sequence[int] = (),
        suppressed: Sequence[int] = (),
        choosing: type[Chooser] = Chooser,
    ) -> tuple[list[Token], GenerationStats]:
        manifest = msgspec.structs.replace(
            fake_manifest(),
            vocab_size=VOCAB,
            hidden_size=1,
            context_length=count + 2,
            num_draft_tokens=K,
            suppress_tokens=tuple(suppressed),
        )
        backend = TableBackend(self.target, self.drafter, self.candidates, count + 8)
        loop = GenerationLoop(backend, manifest, choosing)
        request = Request(
            prompt_ids=(0, 1),
            max_new_tokens=count,
            num_draft_tokens=drafts,
            stop_token_ids=frozenset(stops),
            sampling=sampling,
            constraint=constraint,
        )
        stats = GenerationStats()
        return list(loop.generate(request, stats)), stats

    def expected(self, sampling: Sampling, suppressed: Sequence[int] = ()) -> NDArray[np.float64]:
        """The target's distribution after every pair of tokens. Shapes: [V, V, V]."""
        scores = self.target.reshape(-1, VOCAB).copy()
        scores[:, list(suppressed)] = -np.inf
        rows = [probabilities(row, sampling) for row in scores]
        return np.reshape(rows, self.target.shape)


TABLES = Tables()


def transitions(tokens: Sequence[Token]) -> NDArray[np.float64]:
    """Count what followed each pair of tokens. Shapes: [V, V, V]."""
    ids = np.array([0, 1, *(token.id for token in tokens)])
    counts = np.zeros((VOCAB, VOCAB, VOCAB))
    np.add.at(counts, (ids[:-2], ids[1:-1], ids[2:]), 1)
    return counts


def against_the_target(counts: NDArray[np.float64], p: NDArray[np.float64]) -> float:
    """Return the chi-square p-value of counts by context under probabilities p; 0 if an impossible token came."""
    if (counts[p == 0] > 0).any():
        return 0.0
    expected = p * counts.sum(axis=-1, keepdims=True)
    statistic, freedom = 0.0, 0
    for seen, likely in zip(counts.reshape(-1, VOCAB), expected.reshape(-1, VOCAB), strict=True):
        usual = likely >= 5
        # Rare tokens of a context are one class, for the chi-square to be one.
        rest = likely[~usual].sum()
        classes = usual.sum() + (rest >= 5)
        if classes < 2:
            continue
        statistic += float(((seen - likely)[usual] ** 2 / likely[usual]).sum())
        if rest >= 5:
            statistic += (seen[~usual].sum() - rest) ** 2 / rest
        freedom += int(classes) - 1 if rest >= 5 or rest == 0 else int(classes)
    return float(statistics.chi2.sf(statistic, freedom))


def against_each_other(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the chi-square p-value of two tables of counts by context coming from the same distributions."""
    statistic, freedom = 0.0, 0
    for first, second in zip(one.reshape(-1, VOCAB), other.reshape(-1, VOCAB), strict=True):
        usual = first + second >= 20
        table = np.array([[*row[usual], row[~usual].sum()] for row in (first, second)])
        table = table[:, table.sum(axis=0) > 0]
        if table.shape[1] > 1 and (table.sum(axis=1) >= 50).all():
            test = statistics.chi2_contingency(table, correction=False)
            statistic, freedom = statistic + test.statistic, freedom + test.dof
    assert freedom > 20
    return float(statistics.chi2.sf(statistic, freedom))


@pytest.fixture(scope="module")
def plain() -> Callable[[str], NDArray[np.float64]]:
    """Counts of plain sampling under each of SETTINGS, generated once."""
    counted: dict[str, NDArray[np.float64]] = {}

    def counts(name: str) -> NDArray[np.float64]:
        if name not in counted:
            sampling = Sampling(seed=1, **SETTINGS[name])  # type: ignore[arg-type]  # numbers where they belong
            counted[name] = transitions(TABLES.generate(sampling, drafts=0)[0])
        return counted[name]

    return counts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SETTINGS)
def test_drafts_do_not_change_the_distribution(
    name: str, method: Method, plain: Callable[[str], NDArray[np.float64]]
) -> None:
    sampling = Sampling(seed=2, method=method, **SETTINGS[name])  # type: ignore[arg-type]  # as above
    tokens, stats = TABLES.generate(sampling, drafts=K)
    counts = transitions(tokens)
    assert counts.sum() == DRAWS
    assert 0.1 < stats.acceptance_rate < 0.9
    assert {token.origin for token in tokens} == {"plain", "accepted", "correction", "bonus"}
    assert against_the_target(counts, TABLES.expected(sampling)) > 0.001
    assert against_the_target(plain(name), TABLES.expected(sampling)) > 0.001
    assert against_each_other(counts, plain(name)) > 0.001


class FirstChoiceWithARatio(Chooser):
    """Proposes the drafter's first choice as if it were a sample of q."""

    def propose(self, draft: Draft) -> int:
        super().propose(draft)
        return draft.best


class WithoutResidual(Chooser):
    """Replaces a rejected draft from p instead of max(p - q, 0)."""

    def replacement(
        self, p: NDArray[np.float64], ids: NDArray[np.int32], q: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return p


@pytest.mark.parametrize("biased", [FirstChoiceWithARatio, WithoutResidual])
@pytest.mark.parametrize("name", ["hot", "all"])
def test_a_biased_rule_is_noticed(
    name: str, biased: type[Chooser], plain: Callable[[str], NDArray[np.float64]]
) -> None:
    sampling = Sampling(seed=2, method="speculative", **SETTINGS[name])  # type: ignore[arg-type]  # as above
    counts = transitions(TABLES.generate(sampling, drafts=K, choosing=biased)[0])
    assert against_the_target(counts, TABLES.expected(sampling)) < 1e-6
    assert against_each_other(counts, plain(name)) < 1e-6


def test_speculative_accepts_as_often_as_the_overlap_of_p_and_q() -> None:
    sampling = Sampling(temperature=1.0, method="speculative")
    tokens, stats = TABLES.generate(sampling, drafts=1, count=5000)
    ids = [token.id for token in tokens]
    overlaps = []
    for before, last in pairwise(ids):
        q = np.zeros(VOCAB)
        q[TABLES.candidates[last]] = probabilities(TABLES.drafter[before, last][TABLES.candidates[last]], sampling)
        overlaps.append(np.minimum(q, probabilities(TABLES.target[before, last], sampling)).sum())
    assert stats.acceptance_rate == pytest.approx(np.mean(overlaps), abs=0.03)


@pytest.mark.parametrize("drafts", range(1, K + 1))
def test_with_match_the_output_of_a_seed_is_the_same_with_and_without_drafts(drafts: int) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2, seed=5)
    expected = [token.id for token in TABLES.generate(sampling, drafts=0, count=300)[0]]
    assert [token.id for token in TABLES.generate(sampling, drafts=drafts, count=300)[0]] == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_the_output(method: Method) -> None:
    def ids(seed: int) -> list[int]:
        tokens, _ = TABLES.generate(Sampling(method=method, seed=seed), drafts=K, count=60)
        return [token.id for token in tokens]

    assert ids(3) == ids(3)
    assert ids(3) != ids(4)


def no_repeats(output: Sequence[int]) -> NDArray[np.bool_] | None:
    """Allow everything at first, then nothing that came last, nor the next token after it."""
    if not output:
        return None
    allowed = np.ones(VOCAB, np.bool_)
    allowed[[output[-1], (output[-1] + 1) % VOCAB]] = False
    return allowed


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("constraint", [None, no_repeats])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.8}])
def test_penalty_and_constraint_hold_with_and_without_drafts(
    penalty: float, constraint: Constraint | None, sampling: dict[str, float]
) -> None:
    options = Sampling(repetition_penalty=penalty, **sampling)  # type: ignore[arg-type]  # the temperature
    tokens, stats = TABLES.generate(options, drafts=K, count=400, constraint=constraint)
    plainly, _ = TABLES.generate(options, drafts=0, count=400, constraint=constraint)
    ids = [token.id for token in tokens]
    assert ids == [token.id for token in plainly]
    assert stats.accepted > 20
    if constraint:
        assert all((after - before) % VOCAB > 1 for before, after in pairwise(ids))


def test_a_constraint_sees_every_committed_prefix_once_and_no_other() -> None:
    seen: list[tuple[int, ...]] = []

    def watch(output: Sequence[int]) -> None:
        seen.append(tuple(output))

    tokens, _ = TABLES.generate(Sampling(method="speculative"), drafts=K, count=50, constraint=watch)
    ids = tuple(token.id for token in tokens)
    assert seen == [ids[:length] for length in range(50)]


@pytest.mark.parametrize("drafts", [0, K])
@pytest.mark.parametrize("seed", range(20))
def test_a_constraint_is_not_called_after_a_stop_token(seed: int, drafts: int) -> None:
    def nothing_after_it(output: Sequence[int]) -> NDArray[np.bool_]:
        return np.full(VOCAB, 6 not in output)

    tokens, _ = TABLES.generate(Sampling(seed=seed), drafts=drafts, count=200, constraint=nothing_after_it, stops=[6])
    assert tokens[-1].id == 6


@pytest.mark.parametrize("method", METHODS)
def test_a_constraint_changes_the_distribution_as_the_mask_says(method: Method) -> None:
    sampling = Sampling(temperature=1.0, seed=8, method=method)
    tokens, _ = TABLES.generate(sampling, drafts=K, count=5000, constraint=no_repeats)
    masked = TABLES.target.copy()
    for last in range(VOCAB):
        masked[:, last, [last, (last + 1) % VOCAB]] = -np.inf
    p = np.reshape([probabilities(row, sampling) for row in masked.reshape(-1, VOCAB)], masked.shape)
    counts = transitions(tokens)
    counts[0, 1] = 0  # nothing is forbidden after the prompt
    assert against_the_target(counts, p) > 0.001


@settings(deadline=None, max_examples=40)
@given(pattern=st.lists(st.booleans(), min_size=1, max_size=8), drafts=st.integers(1, 4), seed=st.integers(0, 99))
def test_through_static_signatures_penalty_and_constraint_do_not_depend_on_drafts(
    pattern: list[bool], drafts: int, seed: int
) -> None:
    def odd_after_even(output: Sequence[int]) -> NDArray[np.bool_]:
        parity: NDArray[np.bool_] = np.arange(FAKE_VOCAB) % 2 == len(output) % 2
        return parity

    def ids(k: int, sampling: Sampling) -> list[int]:
        manifest = fake_manifest()
        graphs = FakeBackend(manifest, lambda position: pattern[position % len(pattern)])
        loop = GenerationLoop(StaticBackend(graphs, manifest), manifest)
        request = Request(
            prompt_ids=(2, 9, 4),
            max_new_tokens=25,
            num_draft_tokens=k,
            stop_token_ids=frozenset({STOP}),
            sampling=sampling,
            constraint=odd_after_even,
        )
        return [token.id for token in loop.generate(request, GenerationStats())]

    for temperature in (0.0, 0.3):
        sampling = Sampling(temperature=temperature, repetition_penalty=3.0, seed=seed)
        expected = ids(0, sampling)
        assert ids(drafts, sampling) == expected
        assert all(token % 2 == place % 2 for place, token in enumerate(expected))


def test_temperature_0_is_greedy_and_takes_the_lowest_id_among_equals() -> None:
    assert (
        TABLES.generate(Sampling(temperature=0.0, top_k=2, top_p=0.1), drafts=K, count=50)[0]
        == (TABLES.generate(None, drafts=K, count=50)[0])
    )
    outcome = Chooser(None, None, (1,)).choose((), np.array([[0.0, 2.0, 2.0]], np.float32))
    assert outcome == (0, 1, "plain")


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (np.zeros(VOCAB, np.bool_), "the constraint allows no token after 0: allow a stop token"),
        (np.ones(VOCAB + 1, np.bool_), r"the constraint returned bool \(9,\): return booleans of shape \(8,\)"),
        (np.ones(VOCAB), r"the constraint returned float64 \(8,\)"),
    ],
)
def test_a_constraint_that_makes_no_sense_is_refused(allowed: NDArray[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TABLES.generate(None, drafts=K, count=5, constraint=lambda output: allowed)


def test_margins_are_those_of_the_penalised_choice_and_refused_for_samples() -> None:
    chooser = Chooser(None, lambda output: np.array([False, True, True]), (1,))
    chooser.choose((), np.array([[9.0, 2.0, 0.5]], np.float32))
    assert [row.tolist() for row in chooser.scores] == [[-np.inf, 2.0, 0.5]]
    manifest = fake_manifest()
    loop = GenerationLoop(StaticBackend(FakeBackend(manifest), manifest), manifest)
    request = Request(
        prompt_ids=(2,),
        max_new_tokens=1,
        num_draft_tokens=0,
        stop_token_ids=frozenset(),
        with_margins=True,
        sampling=Sampling(),
    )
    with pytest.raises(UserError, match="with_margins is for greedy choices"):
        next(loop.generate(request, GenerationStats()))
