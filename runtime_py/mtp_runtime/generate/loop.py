"""The generation loop: prefill → (draft → verify → accept → rewind)*, yielding each committed token.

Lossless by construction: every committed token is the target's own choice given the tokens before it, greedy or
sampled (sampling.py). A draft only decides how many of those choices one pass of the target can make.

State between rounds: `filled_length` positions of the cache are processed; the pending token, the last one committed,
is not among them and sits at position `filled_length`; `activations` are the target's at the position before it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mtp_runtime.bundle.contract import Manifest
from mtp_runtime.errors import ContextFullError, UserError
from mtp_runtime.generate.acceptance import top_margin
from mtp_runtime.generate.adaptive import AdaptiveDepth
from mtp_runtime.generate.backend import Backend, FloatArray, TargetPass
from mtp_runtime.generate.sampling import Chooser, Constraint, Sampling
from mtp_runtime.generate.stats import GenerationStats
from mtp_runtime.generate.trace import FinishReason, Token


@dataclass(frozen=True, kw_only=True)
class Request:
    """A generation to be made, greedy without `sampling`.

    `keep_length` leading prompt tokens are taken as already in the cache and not processed. With `adaptive`,
    `num_draft_tokens` is the most that a round drafts, and each round as many as have paid so far (adaptive.py).
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int | None
    num_draft_tokens: int
    stop_token_ids: frozenset[int]
    adaptive: bool = False
    keep_length: int = 0
    with_margins: bool = False
    sampling: Sampling | None = None
    constraint: Constraint | None = None


class GenerationLoop:
    """Runs requests one after another on one backend and its cache."""

    def __init__(self, backend: Backend, manifest: Manifest, choosing: type[Chooser] = Chooser) -> None:
        """Take an opened backend, the manifest of its bundle, and the rules by which tokens are chosen."""
        self._manifest = manifest
        self._backend = backend
        self._cache = backend.kv_cache
        self._pending = 0
        self._activations: FloatArray = np.zeros(manifest.hidden_size, np.float32)
        self._choosing = choosing
        self._chooser = choosing(None, None, ())
        self._adaptive = AdaptiveDepth(manifest.num_draft_tokens)
        self._runs = 0
        self._token_ids: list[int] = []
        self.finish_reason: FinishReason = "abandoned"

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The prompt and the committed tokens of the generation that ran last."""
        return tuple(self._token_ids)

    @property
    def processed_ids(self) -> tuple[int, ...]:
        """The tokens whose rows are in the cache and stay there: of those committed, the last one has none yet."""
        return tuple(self._token_ids[: self._cache.filled_length])

    def restore(self, token_ids: Sequence[int], rows: dict[str, FloatArray]) -> None:
        """Continue where a loop with these `token_ids` and these rows of their cache was.

        Shapes: rows [1, G, n, D] each, of at most as many positions as there are tokens.

        Raises:
            MtpError: the rows do not fit the cache.
        """
        self._cache.restore(rows)
        self.abandon()
        self._token_ids = list(token_ids)

    def generate(self, request: Request, stats: GenerationStats) -> Generator[Token, None, None]:
        """Yield the committed tokens of `request`, a stop id included, filling in `stats`.

        Prompt and output together never exceed the manifest's context_length. Closing the iterator early leaves the
        cache as if generation had ended with the last token that it yielded.

        Raises:
            UserError: the request contradicts the bundle or itself, or another request started in the meantime.
            ContextFullError: the prompt leaves no room for a token.
            RowsLostError: `keep_length` tokens cannot be kept.
        """
        limit, limit_reason = self._check(request)
        self._runs += 1
        this_run = self._runs
        self._chooser = self._choosing(
            request.sampling,
            request.constraint,
            request.prompt_ids,
            request.stop_token_ids,
            suppressed=self._manifest.suppress_tokens,
        )
        self.finish_reason = "abandoned"
        committed = 0
        try:
            batch = self._read_prompt(request, stats)
            while True:
                for token in batch:
                    committed += 1
                    self._token_ids.append(token.id)
                    stats.committed_tokens = committed
                    stopped = token.id in request.stop_token_ids
                    if stopped or committed == limit:
                        self.finish_reason = "stop" if stopped else limit_reason
                        yield token
                        return
                    yield token
                if self._runs != this_run:
                    raise UserError(
                        "the session was closed, or another generation started on it, before this one ended"
                    )
                started = time.perf_counter()
                drafted_ms = stats.draft_ms
                num_drafts = self._most_drafts(min(request.num_draft_tokens, limit - committed - 1))
                if request.adaptive:
                    num_drafts = self._adaptive.choose(num_drafts)
                batch = self._round(num_drafts, request, stats) if num_drafts else self._decode(request, stats)
                round_ms = _ms_since(started)
                stats.generate_wall_ms += round_ms
                if request.adaptive:
                    drafted_ms = stats.draft_ms - drafted_ms
                    self._adaptive.observe(num_drafts, len(batch) - 1, draft_ms=drafted_ms, total_ms=round_ms)
        finally:
            if committed and self._runs == this_run:
                # Of the committed tokens, all but the last are processed.
                self._cache.rewind(len(request.prompt_ids) + committed - 1)

    def abandon(self) -> None:
        """Make a generation that is still under way fail at its next pass."""
        self._runs += 1

    def _most_drafts(self, num_drafts: int) -> int:
        """Return `num_drafts`, or 0 where the drafter drafts nothing: near the end of the cache, or of its rings."""
        return num_drafts if self._cache.pass_room > self._manifest.num_draft_tokens else 0

    def _check(self, request: Request) -> tuple[int, FinishReason]:
        """Return how many tokens may be committed, and the finish reason once they are."""
        prompt_ids, manifest = request.prompt_ids, self._manifest
        if not prompt_ids:
            raise UserError("the prompt is empty: give at least one token")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < manifest.vocab_size:
            raise UserError(f"a prompt token is outside 0 to {manifest.vocab_size - 1}: use the bundle's own tokenizer")
        if not 0 <= request.num_draft_tokens <= manifest.num_draft_tokens:
            raise UserError(
                f"num_draft_tokens is {request.num_draft_tokens}, this bundle takes 0 to {manifest.num_draft_tokens}: "
                "export with a larger --num-draft-tokens for more"
            )
        if request.max_new_tokens is not None and request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {request.max_new_tokens}: give 1 or more")
        if request.with_margins and request.sampling is not None and request.sampling.temperature > 0:
            raise UserError("with_margins is for greedy choices: leave it out, or set temperature 0")
        if not 0 <= request.keep_length <= min(len(prompt_ids) - 1, self._cache.filled_length):
            raise UserError(f"keep_length is {request.keep_length}: the cache holds {self._cache.filled_length} tokens")
        room = manifest.context_length - len(prompt_ids)
        if room < 1:
            can_be_longer = manifest.context_length < manifest.longest_context_length
            remedy = "open it with a larger context_length" if can_be_longer else "export with a larger --cache-length"
            raise ContextFullError(
                f"the prompt has {len(prompt_ids)} tokens, the context takes {manifest.context_length} with the "
                f"answer: shorten it, or {remedy}"
            )
        if request.max_new_tokens is not None and request.max_new_tokens <= room:
            return request.max_new_tokens, "max_tokens"
        return room, "context"

    def _read_prompt(self, request: Request, stats: GenerationStats) -> list[Token]:
        """Process the prompt, its last token by a decode step, which yields the first committed token."""
        started = time.perf_counter()
        stats.prompt_tokens = len(request.prompt_ids)
        stats.reused_tokens = request.keep_length
        self._cache.rewind(request.keep_length)
        self._token_ids = list(request.prompt_ids)
        last = len(request.prompt_ids) - 1
        with self._timed(stats, "prefill_ms"):
            self._backend.prefill(request.prompt_ids[request.keep_length : last])
        self._pending = request.prompt_ids[last]
        batch = self._decode(request, stats)
        stats.prompt_wall_ms = _ms_since(started)
        return batch

    def _decode(self, request: Request, stats: GenerationStats) -> list[Token]:
        """Process the pending token alone."""
        with self._timed(stats, "decode_ms"):
            result = self._backend.verify((self._pending,))
            self._cache.advance(1)
        stats.decode_steps += 1
        return self._commit((), result, request, stats)

    def _round(self, num_drafts: int, request: Request, stats: GenerationStats) -> list[Token]:
        """Draft, verify the pending token and the drafts in one pass, and keep what the target agrees with."""
        position = self._cache.filled_length
        with self._timed(stats, "draft_ms"):
            drafts = self._propose(num_drafts)
        with self._timed(stats, "verify_ms"):
            result = self._backend.verify((self._pending, *drafts))
            self._cache.advance(num_drafts + 1)
        batch = self._commit(drafts, result, request, stats)
        stats.count_round(num_drafts, len(batch) - 1)
        self._cache.rewind(position + len(batch))
        return batch

    def _propose(self, count: int) -> list[int]:
        """Propose `count` tokens after the pending one, each from the one before."""
        drafts: list[int] = []
        token, activations = self._pending, self._activations
        for _ in range(count):
            draft = self._backend.draft(token, activations, with_candidates=self._chooser.wants_candidates)
            token, activations = self._chooser.propose(draft), draft.activations
            drafts.append(token)
        return drafts

    def _commit(
        self, drafts: Sequence[int], result: TargetPass, request: Request, stats: GenerationStats
    ) -> list[Token]:
        """Turn a pass over the pending token and the drafts into committed tokens; the last becomes the pending one."""
        started = time.perf_counter()
        accepted, next_token, origin = self._chooser.choose(drafts, result.logits)
        margins = [top_margin(row) if request.with_margins else None for row in self._chooser.scores]
        batch = [Token(draft, "accepted", margin) for draft, margin in zip(drafts, margins[:accepted], strict=False)]
        batch.append(Token(next_token, origin, margins[accepted]))
        self._pending = next_token
        self._activations = result.activations[accepted]
        stats.accept_ms += _ms_since(started)
        return batch

    @contextlib.contextmanager
    def _timed(self, stats: GenerationStats, phase: str) -> Iterator[None]:
        """Add the time of a block to a phase, without the time of its embeddings, which is added to theirs."""
        started, embed_ms = time.perf_counter(), self._backend.embed_ms
        yield
        embed_ms = self._backend.embed_ms - embed_ms
        stats.embed_ms += embed_ms
        setattr(stats, phase, getattr(stats, phase) + _ms_since(started) - embed_ms)


def _ms_since(started: float) -> float:
    return 1000.0 * (time.perf_counter() - started)
