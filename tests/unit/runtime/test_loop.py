"""The generation loop on a backend that notices every wrong row, position, mask and activation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_runtime.backends.litert.static import StaticBackend, plan_prefill
from mtp_runtime.errors import ContextFullError, UserError
from mtp_runtime.generate.loop import GenerationLoop, Request
from mtp_runtime.generate.stats import GenerationStats
from mtp_runtime.generate.trace import Token
from tests.support.fake_backend import VOCAB, FakeBackend, continuation, fake_manifest

PROMPT = (2, 9, 4, 7, 7, 3, 11, 30, 5, 6)
Agree = Callable[[int], bool]


def always(position: int) -> bool:
    return True


def never(position: int) -> bool:
    return False


def request(
    prompt: Sequence[int] = PROMPT, *, count: int | None = 20, drafts: int = 4, stops: Sequence[int] = (), keep: int = 0
) -> Request:
    return Request(
        prompt_ids=tuple(prompt),
        max_new_tokens=count,
        num_draft_tokens=drafts,
        stop_token_ids=frozenset(stops),
        keep_length=keep,
    )


class Run:
    """A fresh loop, with what it yields for one request after another."""

    def __init__(self, agree: Agree = always, **manifest: int) -> None:
        self.manifest = fake_manifest(**manifest)  # type: ignore[arg-type]  # only integer options are used here
        self.backend = FakeBackend(self.manifest, agree)
        self.loop = GenerationLoop(StaticBackend(self.backend, self.manifest), self.manifest)
        self.stats = GenerationStats()

    def tokens(self, a_request: Request) -> list[Token]:
        self.stats = GenerationStats()
        return list(self.loop.generate(a_request, self.stats))

    def ids(self, a_request: Request) -> list[int]:
        return [token.id for token in self.tokens(a_request)]

    def runs(self, role: str, name: str) -> int:
        return self.backend.signatures[role, name].runs


# Prompts, numbers of drafts and of tokens, and by position, over and over, whether the drafter is right.
any_request = given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
    drafts=st.integers(0, 4),
    count=st.integers(1, 60),
    pattern=st.lists(st.booleans(), min_size=1, max_size=12),
)


@settings(deadline=None, max_examples=60)
@any_request
def test_a_k_that_adapts_changes_no_token(prompt: list[int], drafts: int, count: int, pattern: list[bool]) -> None:
    run = Run(lambda position: pattern[position % len(pattern)])
    adaptive = dataclasses.replace(request(prompt, count=count, drafts=drafts), adaptive=True)
    for _ in range(3):  # what it learnt stays from one generation to the next
        room = run.manifest.context_length - len(prompt)
        assert run.ids(adaptive) == continuation(prompt, min(count, room))
        assert len(run.stats.drafted_at) <= drafts
        assert sum(run.stats.rounds_by_num_drafts) == run.stats.rounds + run.stats.decode_steps


def test_a_k_that_adapts_learns_whether_drafts_are_right() -> None:
    for agree, deepest in ((always, True), (never, False)):
        run = Run(agree)
        # Costs that a real machine might have, whatever this one does meanwhile.
        observe = run.loop._adaptive.observe

        def with_costs(k: int, accepted: int, observe: Callable[..., None] = observe, **_: float) -> None:
            observe(k, accepted, draft_ms=0.1 * k, total_ms=0.1 * k + (1.5 if k else 1.0))

        run.loop._adaptive.observe = with_costs  # type: ignore[assignment]
        for _ in range(8):
            run.tokens(dataclasses.replace(request(count=45), adaptive=True))
        rounds = run.stats.rounds_by_num_drafts
        assert len(rounds) == 5 if deepest else len(rounds) <= 5
        assert rounds[-1] >= 8 if deepest else rounds[0] > 40, rounds


@settings(deadline=None, max_examples=150)
@any_request
def test_output_never_depends_on_the_drafter_or_on_k(
    prompt: list[int], drafts: int, count: int, pattern: list[bool]
) -> None:
    run = Run(lambda position: pattern[position % len(pattern)])
    room = run.manifest.context_length - len(prompt)
    assert run.ids(request(prompt, count=count, drafts=drafts)) == continuation(prompt, min(count, room))
    assert run.loop.finish_reason == ("max_tokens" if count <= room else "context")


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_a_drafter_that_equals_the_target_is_accepted_whole(drafts: int) -> None:
    run = Run(always)
    tokens = run.tokens(request(count=1 + 3 * (drafts + 1), drafts=drafts))
    assert [token.origin for token in tokens] == ["plain", *3 * [*drafts * ["accepted"], "bonus"]]
    assert (run.stats.rounds, run.stats.committed_per_round) == (3, drafts + 1)
    assert run.stats.drafted_at == run.stats.accepted_at == drafts * [3]
    assert run.stats.acceptance_rate == 1.0


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_an_adversarial_drafter_costs_rounds_and_no_tokens(drafts: int) -> None:
    run = Run(never)
    tokens = run.tokens(request(count=8, drafts=drafts))
    # The last token may not be drafted for: nothing after it can be committed.
    assert [token.origin for token in tokens] == ["plain", *6 * ["correction"], "plain"]
    assert run.stats.accepted == 0
    assert run.stats.committed_per_round == 1.0


def test_each_position_of_a_round_is_counted() -> None:
    # Rounds start at 11; positions 11 and 12 agree, 13 does not, and so on by threes from each round's start.
    run = Run(lambda position: position % 3 != 1)
    run.tokens(request(count=13))
    assert run.stats.accepted_at[0] >= run.stats.accepted_at[1] >= run.stats.accepted_at[2] == 0
    assert run.stats.drafted_at[0] == run.stats.rounds
    assert run.stats.committed_tokens == 13
    assert run.stats.rounds_by_num_drafts[0] == run.stats.decode_steps
    assert sum(run.stats.rounds_by_num_drafts[1:]) == run.stats.rounds
    assert run.stats.round_tokens + run.stats.decode_steps == 13


@pytest.mark.parametrize("count", range(1, 16))
@pytest.mark.parametrize("drafts", [0, 1, 4])
def test_max_new_tokens_is_exact_and_no_draft_is_wasted(count: int, drafts: int) -> None:
    run = Run(always)
    assert len(run.ids(request(count=count, drafts=drafts))) == count
    assert run.loop.finish_reason == "max_tokens"
    assert run.stats.committed_tokens == run.stats.round_tokens + run.stats.decode_steps == count


@pytest.mark.parametrize("drafts", [0, 1, 4])
@pytest.mark.parametrize("place", range(1, 12))
def test_a_stop_id_ends_the_output_wherever_it_falls_in_a_round(place: int, drafts: int) -> None:
    expected = continuation(PROMPT, 30)
    stop = expected[place]
    run = Run(always)
    assert run.ids(request(count=30, drafts=drafts, stops=[stop])) == expected[: expected.index(stop) + 1]
    assert run.loop.finish_reason == "stop"
    assert run.backend.kv_cache.filled_length == len(PROMPT) + expected.index(stop)


@pytest.mark.parametrize("agree", [always, never])
@pytest.mark.parametrize("drafts", [0, 1, 3, 4])
def test_generation_fills_the_context_to_its_last_slot(drafts: int, agree: Agree) -> None:
    run = Run(agree)
    tokens = run.ids(request(count=None, drafts=drafts))
    assert len(PROMPT) + len(tokens) == run.manifest.context_length
    assert tokens == continuation(PROMPT, len(tokens))
    assert run.loop.finish_reason == "context"


@pytest.mark.parametrize("drafts", [0, 4])
def test_the_longest_prompt_leaves_room_for_one_token(drafts: int) -> None:
    run = Run(always)
    prompt = [2] * (run.manifest.context_length - 1)
    assert run.ids(request(prompt, count=None, drafts=drafts)) == continuation(prompt, 1)
    with pytest.raises(ContextFullError, match="the prompt has 60 tokens, the context takes 60"):
        run.ids(request([*prompt, 2], count=None, drafts=drafts))


@pytest.mark.parametrize("seen", range(1, 14))
@pytest.mark.parametrize("agree", [always, never, lambda position: position % 3 != 0])
def test_rewind_then_continue_equals_an_uninterrupted_run(seen: int, agree: Agree) -> None:
    run = Run(agree)
    expected = continuation(PROMPT, 24)
    interrupted = run.loop.generate(request(count=24), GenerationStats())
    first = [token.id for token in islice(interrupted, seen)]
    interrupted.close()
    assert run.loop.finish_reason == "abandoned"
    kept = len(PROMPT) + seen - 1
    assert run.backend.kv_cache.filled_length == kept
    prefilled = run.runs("target", "prefill_8") + run.runs("target", "prefill_16")
    assert first + run.ids(request([*PROMPT, *first], count=24 - seen, keep=kept)) == expected
    assert run.runs("target", "prefill_8") + run.runs("target", "prefill_16") == prefilled


def test_padding_never_depends_on_what_was_there_before() -> None:
    run = Run(never)
    run.ids(request(count=20, drafts=4))
    run.ids(request(count=4, drafts=2))
    rows = run.backend.signatures["target", "verify"].inputs["embeddings"][0, :, 0]
    assert (rows[:2] != 0.0).all()
    assert (rows[3:] == 0.0).all()


def test_a_second_generation_starts_from_nothing() -> None:
    run = Run(never)
    run.ids(request(count=20))
    other = (2, 40, 41)
    assert run.ids(request(other, count=9)) == continuation(other, 9)


def test_a_generation_that_was_overtaken_says_so() -> None:
    run = Run(always)
    first = run.loop.generate(request(), GenerationStats())
    next(first)
    run.ids(request(count=3))
    with pytest.raises(UserError, match="another generation started"):
        list(first)
    assert run.backend.kv_cache.filled_length == len(PROMPT) + 2


def test_no_variant_of_format_version_1_is_run() -> None:
    run = Run(always)
    run.ids(request([2], count=None))
    used = {name: run.runs("target", name) for name in ("verify_16", "verify_32", "verify")}
    assert used == {"verify_16": 0, "verify_32": 0, "verify": 12}
    assert run.runs("drafter", "draft_16") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (2, VOCAB)}, f"outside 0 to {VOCAB - 1}"),
        ({"prompt": (2, -1)}, f"outside 0 to {VOCAB - 1}"),
        ({"drafts": 5}, "num_draft_tokens is 5, this bundle takes 0 to 4"),
        ({"drafts": -1}, "num_draft_tokens is -1"),
        ({"count": 0}, "max_new_tokens is 0: give 1 or more"),
        ({"keep": 1}, "keep_length is 1: the cache holds 0 tokens"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Run().ids(request(**changes))  # type: ignore[arg-type]  # each case replaces one argument


@settings(deadline=None)
@given(
    start=st.integers(0, 60),
    length=st.integers(0, 60),
    sizes=st.lists(st.integers(2, 40), max_size=4, unique=True),
)
def test_a_prefill_plan_covers_the_prompt_and_never_leaves_the_cache(start: int, length: int, sizes: list[int]) -> None:
    cache_length = 64
    stop = min(start + length, cache_length)
    position = start
    for size, count in plan_prefill(start, stop, sizes, cache_length):
        assert size in (1, *sizes)
        assert 1 <= count <= size
        assert position + size <= cache_length
        position += count
    assert position == max(start, stop)


@pytest.mark.parametrize(
    ("length", "plan"),
    [
        (300, [(128, 128), (128, 128), (32, 32), (8, 8), (8, 4)]),
        (130, [(128, 128), (8, 2)]),
        (31, [(32, 31)]),
        (8, [(8, 8)]),
        (0, []),
    ],
)
def test_a_prefill_plan_takes_few_passes(length: int, plan: list[tuple[int, int]]) -> None:
    assert plan_prefill(0, length, (8, 32, 128), 1024) == plan
