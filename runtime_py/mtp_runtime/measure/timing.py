"""The times of an opened bundle's passes and rounds, and the acceptance from which drafts pay.

Acceptance is a property of weights and text. To see the gain of a round at a certain acceptance, drafts are imposed:
the drafter runs, which takes its time, and its draft is replaced by the target's own next token with a probability of
alpha, by a wrong one otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from mtp_runtime.errors import UserError
from mtp_runtime.generate.backend import Draft, FloatArray
from mtp_runtime.generate.session import Session
from mtp_runtime.generate.stats import overall_acceptance_rate, overall_committed_per_round

_WARM_UP = 2  # the first runs of a graph pack its weights
_GOLDEN_RATIO = 0.6180339887498949  # multiples of it, modulo 1, are spread most evenly


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """The time of one kind of pass: the median, and the tenth and ninetieth percentile."""

    tokens: int
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int

    @property
    def tokens_per_second(self) -> float:
        return 1000.0 * self.tokens / self.median_ms

    @classmethod
    def of(cls, times_ms: Sequence[float], tokens: int) -> Timing:
        low, median, high = (float(ms) for ms in np.quantile(times_ms, (0.1, 0.5, 0.9)))
        return cls(tokens=tokens, median_ms=median, low_ms=low, high_ms=high, runs=len(times_ms))


class Rounds(msgspec.Struct, frozen=True, kw_only=True):
    """The time of generating at one acceptance, `alpha`: None for the drafter's own drafts and for plain decoding,
    which has 0 drafts."""

    num_draft_tokens: int
    alpha: float | None
    ms_per_token: float
    committed_per_round: float
    acceptance_rate: float | None
    same_output: bool
    distinct_tokens: int


def filled_prompt(session: Session, filled: int) -> list[int]:
    """Return a prompt of so many different tokens, to fill the cache with."""
    vocab = session.manifest.vocab_size
    return [session.manifest.bos_token_id, *(100 + i % (vocab - 100) for i in range(filled - 1))]


def pass_sizes(session: Session) -> list[int]:
    """Return the numbers of tokens in a pass that take times of their own: all up to K + 1, or those of the target's
    static graphs, where fewer tokens are padded."""
    most, kinds = session.manifest.num_draft_tokens + 1, session.manifest.signatures["target"]
    if any(signature.kind == "forward" for signature in kinds):
        return list(range(1, most + 1))
    return sorted({s.num_tokens for s in kinds if s.kind in ("decode", "verify")})


def time_passes(session: Session, prompt: Sequence[int], repeats: int = 12) -> dict[str, Timing]:
    """Time the prefill of the prompt, and at its end decode, verify of every size and drafts, all of them in turn.

    A draft's time is the mean of a round's, of which the first finds less in the processor's caches than the others.

    Raises:
        UserError: behind the prompt, nothing would be drafted.
    """
    backend = session.backend
    activations = np.zeros(session.manifest.hidden_size, np.float32)
    prefills = []
    for _ in range(3):
        backend.kv_cache.rewind(0)
        prefills.append(_ms(lambda: backend.prefill(prompt)))
        _check_room(session)
    steps: dict[str, tuple[int, int, Callable[[], object]]] = {}  # tokens of a pass, passes in a row, one pass
    for size in pass_sizes(session):
        steps["decode" if size == 1 else f"verify_{size}"] = size, 1, lambda n=size: backend.verify(prompt[:n])  # type: ignore[misc]
    steps["draft"] = 1, session.manifest.num_draft_tokens, lambda: backend.draft(prompt[-1], activations)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_WARM_UP + repeats):
        for name, (_, in_a_row, step) in steps.items():
            times[name].append(sum(_ms(step) for _ in range(in_a_row)) / in_a_row)
    taken = {name: Timing.of(times[name][_WARM_UP:], tokens) for name, (tokens, _, _) in steps.items()}
    return {f"prefill_{len(prompt)}": Timing.of(prefills[1:], len(prompt))} | taken


def _check_room(session: Session) -> None:
    """Check that a verify is one pass here: at the end of a ring it is two."""
    cache, manifest = session.backend.kv_cache, session.manifest
    filled, tokens = cache.filled_length, manifest.num_draft_tokens + 1
    if cache.pass_room < tokens:
        ring = f", or a ring of {manifest.ring_length}," if manifest.ring_length else ""
        raise UserError(
            f"with {filled} tokens filled, the context{ring} ends within {tokens} tokens, where nothing is drafted: "
            f"fill {filled - tokens} instead"
        )


def time_rounds(
    session: Session,
    prompt: Sequence[int],
    new_tokens: int,
    alphas: Sequence[float | None],
    repeats: int = 2,
    on_run: Callable[[], None] = lambda: None,
) -> list[Rounds]:
    """Time plain decoding and rounds of K drafts at every alpha, in turn; the first result is that of plain decoding.

    Passes of one token and of several may part at a near-tie, so the imposed tokens, and those that rounds are compared
    with, are the target's own in rounds.
    """
    k = session.manifest.num_draft_tokens
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "stop_token_ids": ()}
    plain = session.generate(prompt, num_draft_tokens=0, **options).finish()
    drafted = session.generate(prompt, num_draft_tokens=k, **options).finish()
    runs: list[tuple[int, float | None]] = [(0, None), *((k, alpha) for alpha in alphas)]
    wall_ms, same, last = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, True), {}
    for _ in range(repeats):
        for drafts, alpha in runs:
            timed = session
            if alpha is not None and drafts:
                timed = Session(session.bundle, ImposedDrafts(session, drafted.tokens, len(prompt), alpha))
            trace = timed.generate(prompt, num_draft_tokens=drafts, **options).finish()
            same[drafts, alpha] &= trace.tokens == (drafted if drafts else plain).tokens
            wall_ms[drafts, alpha] += trace.stats.generate_wall_ms
            last[drafts, alpha] = trace.stats
            on_run()
    return [
        Rounds(
            num_draft_tokens=drafts,
            alpha=alpha,
            ms_per_token=wall_ms[drafts, alpha] / (repeats * (new_tokens - 1)),
            committed_per_round=overall_committed_per_round([stats]) or 1.0,
            acceptance_rate=overall_acceptance_rate([stats]),
            same_output=same[drafts, alpha],
            distinct_tokens=len(set(plain.tokens)),
        )
        for (drafts, alpha), stats in last.items()
    ]


class ImposedDrafts:
    """A Backend whose drafts are the target's own next tokens with a probability of `alpha` each, and wrong otherwise.

    It runs the passes of another backend, its drafter too, so that a round takes the time that it takes. `tokens` are
    the target's after a prompt of `prompt_length`. Rounds take their chances evenly from 0 to 1, not at random: a short
    run commits nearly what a long one does.
    """

    def __init__(self, session: Session, tokens: Sequence[int], prompt_length: int, alpha: float) -> None:
        self._own, self._tokens, self._alpha = session.backend, tokens, alpha
        self._prompt_length, self._vocab_size = prompt_length, session.manifest.vocab_size
        self._filled, self._step, self._chance = -1, 0, 0.0
        self.kv_cache = self._own.kv_cache
        self.prefill, self.verify, self.close = self._own.prefill, self._own.verify, self._own.close

    @property
    def embed_ms(self) -> float:
        return self._own.embed_ms

    def draft(self, token_id: int, activations: FloatArray, *, with_candidates: bool = False) -> Draft:
        draft = self._own.draft(token_id, activations, with_candidates=with_candidates)
        filled = self.kv_cache.filled_length
        if filled == self._filled:
            self._step += 1
        else:
            self._filled, self._step, self._chance = filled, 0, (self._chance + _GOLDEN_RATIO) % 1.0
        # The pending token, at `filled`, is output number filled - prompt_length; the first draft is the one after it.
        number = filled - self._prompt_length + 1 + self._step
        right = self._tokens[number] if number < len(self._tokens) else 0
        # The first n drafts of a round are all right with a chance of alpha^n.
        is_right = self._chance < self._alpha ** (self._step + 1)
        return draft._replace(best=right if is_right else (right + 1) % self._vocab_size)


def expected_committed(alpha: float, num_drafts: int) -> float:
    """Return the tokens that a round commits on average if every draft is kept with a probability of alpha, up to the
    first that is not (Leviathan et al. 2023, equation 1)."""
    return sum(alpha**i for i in range(num_drafts + 1))


def round_ms(passes: Mapping[str, float], num_drafts: int) -> float:
    """Return the time of a round by the times of its passes: so many drafts, and the smallest verify for them."""
    sizes = [int(name.removeprefix("verify_")) for name in passes if name.startswith("verify_")]
    size = min(size for size in sizes if size > num_drafts)
    return num_drafts * passes["draft"] + passes[f"verify_{size}"]


def break_even(decode_ms: float, taken_ms: float, num_drafts: int) -> float | None:
    """Return the acceptance from which rounds of `taken_ms` are faster than plain decoding; None if none is."""
    needed = taken_ms / decode_ms
    if needed > num_drafts + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_committed(middle, num_drafts) < needed else (low, middle)
    return round(high, 4)


def _ms(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return 1000.0 * (time.perf_counter() - started)
