"""Sampling without loss: committed tokens have the target's distribution, whatever the drafter proposes.

A row of the target's logits becomes probabilities p by the usual processors, in the order of transformers: repetition
penalty, suppressed tokens, allowed tokens, temperature, top-k, top-p. Two rules decide about a draft:

- match: the drafter proposes its first choice, the target samples from p; the draft is accepted if it is that sample.
- speculative: the draft is sampled from the drafter's probabilities q, accepted with probability min(1, p/q), and
  replaced by a sample of max(p - q, 0), normalised, if it is not. Source: Leviathan et al. 2023 (arXiv 2211.17192),
  Chen et al. 2023 (arXiv 2302.01318).

A row is judged only once every draft before it is accepted, so its penalty and its mask see committed tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mtp_runtime.errors import UserError
from mtp_runtime.generate.acceptance import Acceptance, accept_each
from mtp_runtime.generate.backend import Draft, FloatArray, IntArray

Probabilities = NDArray[np.float64]
Method = Literal["match", "speculative"]

# Called with the tokens of the output so far, the prompt not among them; returns which tokens may follow, [V], or None
# where all may. It is called once for every committed token, in order.
Constraint = Callable[[Sequence[int]], NDArray[np.bool_] | None]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. At temperature 0 nothing is: the highest penalised logit is taken.

    `top_k` None and `top_p` 1 keep every token. The same seed gives the same output; with "match" it is also the same
    with and without drafts.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    method: Method = "match"

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not 0.0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: give 0 for greedy, or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: give 1 or more, or none to keep every token")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}: give more than 0 and at most 1")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: give 0 or more")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}: give more than 0; 1 changes nothing")
        if self.method not in get_args(Method):
            raise UserError(f"method is {self.method!r}: give one of {', '.join(get_args(Method))}")


def penalised(logits: FloatArray, tokens: Collection[int], penalty: float) -> FloatArray:
    """Return `logits` with those of `tokens` divided by `penalty` where they are positive, multiplied elsewhere.

    Shapes: logits [V]. Source: Keskar et al. 2019 (arXiv 1909.05858), in transformers' variant for negative logits.
    """
    scores = logits.copy()
    ids = np.fromiter(set(tokens), np.intp)
    chosen = scores[ids]
    scores[ids] = np.where(chosen < 0, chosen * penalty, chosen / penalty)
    return scores


def probabilities(scores: FloatArray, sampling: Sampling) -> Probabilities:
    """Return softmax(scores / temperature) cut to the top-k and then to the top-p, at a temperature above 0.

    Equals of the k-th best stay, too; of equals at the edge of top-p the lower ids stay. Disallowed tokens have the
    score -inf.

    Shapes: scores [N].
    """
    # Only what is left of a large vocabulary goes through the arithmetic.
    ids = np.arange(len(scores))
    if sampling.top_k is not None and sampling.top_k < len(scores):
        ids = np.flatnonzero(scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k])
    with np.errstate(over="ignore"):  # a tiny temperature makes -inf, which is meant
        weights = np.exp((scores[ids].astype(np.float64) - scores.max()) / sampling.temperature)
    weights /= weights.sum()
    if sampling.top_p < 1.0:
        # Tokens this improbable fall outside together, so only the others need sorting.
        likely = np.flatnonzero(weights > (1.0 - sampling.top_p) / len(weights))
        likely = likely[np.argsort(-weights[likely], kind="stable")]
        before = np.cumsum(weights[likely]) - weights[likely]
        likely = likely[before < sampling.top_p]
        ids, weights = ids[likely], weights[likely] / weights[likely].sum()
    p = np.zeros(len(scores))
    p[ids] = weights
    return p


def residual(p: Probabilities, ids: IntArray, q: Probabilities) -> Probabilities:
    """Return max(p - q, 0), normalised: the probabilities that a rejected draft is replaced from.

    `q` holds the drafter's probabilities of the tokens `ids`; it is zero elsewhere.

    Shapes: p [V], ids and q [N].
    """
    rest = p.copy()
    rest[ids] = np.maximum(rest[ids] - q, 0.0)
    total = rest.sum()
    # Nothing is left only where p equals q but for rounding, and then p is right.
    return rest / total if total > 0.0 else p


def draw(p: Probabilities, random: np.random.Generator) -> int:
    """Return an index drawn from `p`, never one of probability 0, for one number of `random`. Shapes: p [N]."""
    ids = np.flatnonzero(p)
    ends = np.cumsum(p[ids])
    place = np.searchsorted(ends, random.random() * ends[-1], side="right")
    return int(ids[min(int(place), len(ids) - 1)])


class Chooser:
    """Chooses the committed tokens of one request: proposes drafts and judges them by the target's logits.

    `scores` are the penalised and masked logits of the rows that the last `choose` looked at.
    """

    def __init__(
        self,
        sampling: Sampling | None,
        constraint: Constraint | None,
        prompt_ids: Sequence[int],
        stop_token_ids: frozenset[int] = frozenset(),
        *,
        suppressed: Sequence[int] = (),
    ) -> None:
        """Start with no output; without `sampling` the choice is greedy. After a stop token nothing is constrained.

        The tokens `suppressed` are never chosen.
        """
        self._sampling = Sampling(temperature=0.0) if sampling is None else sampling
        self._constraint = constraint
        self._tokens = list(prompt_ids)
        self._prompt_length = len(prompt_ids)
        self._stop_token_ids = stop_token_ids
        self._suppressed = np.array(suppressed, np.intp)
        self._random = np.random.default_rng(self._sampling.seed)
        self._samples = self._sampling.temperature > 0.0
        self._samples_drafts = self._samples and self._sampling.method == "speculative"
        # Token ids and q of the drafts of this round.
        self._proposals: list[tuple[IntArray, Probabilities]] = []
        self.scores: list[FloatArray] = []

    @property
    def wants_candidates(self) -> bool:
        """Whether `propose` needs the scores of the drafter's candidates."""
        return self._samples_drafts

    def propose(self, draft: Draft) -> int:
        """Return the token to propose for a draft: the drafter's first choice, or a sample of q.

        q is the softmax of the candidates' scores under the request's temperature, top-k and top-p. It knows no
        penalty, which is not defined for scores up to a constant, and no mask: the target refuses such a draft.
        """
        if not self._samples_drafts:
            return draft.best
        assert draft.candidates is not None
        assert draft.scores is not None
        q = probabilities(draft.scores, self._sampling)
        self._proposals.append((draft.candidates, q))
        return int(draft.candidates[draw(q, self._random)])

    def choose(self, drafts: Sequence[int], logits: FloatArray) -> Acceptance:
        """Judge `drafts`, all that were proposed since the last call, and commit the accepted and the next token.

        Shapes: logits [K + 1, V].

        Raises:
            UserError: the constraint allows no token, or its mask has another shape.
        """
        self.scores = []

        def token_at(row: int) -> int:
            scores = self._processed(logits[row])
            self.scores.append(scores)
            token = self._own(scores) if row == len(drafts) else self._judge(scores, row, drafts[row])
            self._tokens.append(token)
            return token

        acceptance = accept_each(drafts, token_at)
        self._proposals.clear()
        return acceptance

    def _own(self, scores: FloatArray) -> int:
        """Return the target's own choice."""
        if not self._samples:
            return int(scores.argmax())
        return draw(probabilities(scores, self._sampling), self._random)

    def _judge(self, scores: FloatArray, row: int, draft: int) -> int:
        """Return the token in the place of `draft`: `draft` itself if and only if it is accepted."""
        if not self._samples_drafts:
            return self._own(scores)
        p = probabilities(scores, self._sampling)
        ids, q = self._proposals[row]
        if self._random.random() * float(q[ids == draft][0]) < p[draft]:
            return draft
        return draw(self.replacement(p, ids, q), self._random)

    def replacement(self, p: Probabilities, ids: IntArray, q: Probabilities) -> Probabilities:
        """Return the probabilities that a rejected draft is replaced from. Shapes: p [V], ids and q [N]."""
        return residual(p, ids, q)

    def _processed(self, logits: FloatArray) -> FloatArray:
        """Apply the penalty and the masks that follow from the tokens so far. Shapes: logits [V]."""
        scores = logits
        if self._sampling.repetition_penalty != 1.0:
            scores = penalised(scores, self._tokens, self._sampling.repetition_penalty)
        if len(self._suppressed):
            scores = scores.copy()
            scores[self._suppressed] = -np.inf
        if self._constraint is None:
            return scores
        output = tuple(self._tokens[self._prompt_length :])
        # A round may go on beyond a stop token, with tokens that nobody will see.
        if not self._stop_token_ids.isdisjoint(output):
            return scores
        allowed = self._constraint(output)
        if allowed is None:
            return scores
        if allowed.shape != scores.shape or allowed.dtype != np.bool_:
            raise UserError(
                f"the constraint returned {allowed.dtype} {allowed.shape}: return booleans of shape {scores.shape}"
            )
        if not (allowed & (scores > -np.inf)).any():
            raise UserError(
                f"the constraint allows no token after {len(output)}: allow a stop token where the text may end"
            )
        return np.where(allowed, scores, np.float32(-np.inf))
