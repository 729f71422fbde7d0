"""Is a bundle still the same model? Its hops and its whole, run by mtp_runtime, against its checkpoint in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from mtp_calibration.same_model.bundle_weights import as_values, stored_weights, with_row_scales
from mtp_calibration.same_model.float_pair import LOOKUPS, FloatDrafter, FloatTarget, Said, Values, lookup_name
from mtp_calibration.same_model.metrics import Agreement, Divergence, RelativeError, divergence
from mtp_calibration.same_model.observe import Observed, Text, accepted, continued, observe
from mtp_calibration.same_model.structured import is_valid
from mtp_export.check.prompts import Prompt
from mtp_export.source.pair import Pair
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.stored import StoredWeight
from mtp_runtime import Session

_MOST_ROWS = 2048  # of a weight that are compared
_LAYER_TEXTS = 4  # on which the effect of single layers is measured
_GAIN_OFF = 0.15  # a row whose scale differs by so much is wrong: rounding moves it by a fiftieth of that

Progress = Callable[[str], None]


class WeightError(msgspec.Struct, frozen=True, kw_only=True):
    """A stored weight against the checkpoint's: error relative to it, the factor by which it is too large, and the
    share of rows whose own factor is off."""

    name: str
    bits: int
    error: float
    gain: float
    rows_off: float


class LayerEffect(msgspec.Struct, frozen=True, kw_only=True):
    """KL per token of the float model with the bundle's weights in one layer only."""

    layer: str
    kl: float


class DrafterQuality(msgspec.Struct, frozen=True, kw_only=True):
    """The drafter's graph against the float drafter on the same inputs, and how drafts fare.

    error_by_offset: of projected activations, by position convention (0: L - 1, 1: L): the graph has the one whose
    error is small. same_candidates: share of the candidates that the float centroids choose too. score_error: of the
    candidates' scores, as differences from their mean. accepted_per_round: drafts accepted in `rounds`, and in the
    same rounds by the float pair; over all `float_rounds` the float pair's by convention, with the standard error of
    their difference.
    """

    rounds: int
    error_by_offset: tuple[float, float]
    same_candidates: float
    score_error: float
    accepted_per_round: float
    float_same_rounds: float
    float_rounds: int
    float_accepted_per_round: tuple[float, float]
    float_difference_error: float
    num_draft_tokens: int


class Structured(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts that ask for JSON or tool calls: valid answers of the float model and of the bundle, and prompts whose
    answer was valid in float and is not in the bundle."""

    prompts: int
    float_valid: int
    valid: int
    lost: tuple[str, ...]


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """All that is measured of a bundle. `hops` are relative errors by name, in the order of the data."""

    texts: int
    tokens: int
    kl_per_token: float
    weights_kl_per_token: float
    top1_agreement: float
    float_perplexity: float
    perplexity: float
    divergences: tuple[Divergence, ...]
    hops: dict[str, float]
    weights: tuple[WeightError, ...]
    layers: tuple[LayerEffect, ...]
    drafter: DrafterQuality
    structured: Structured


def measure(
    session: Session,
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    max_new_tokens: int,
    on_stage: Progress = lambda name: None,
) -> Quality:
    """Measure a bundle against the pair that it was made from.

    Raises:
        MtpError: the bundle cannot be run.
    """
    on_stage("answers of the bundle")
    texts = [continued(session, prompt, max_tokens=max_tokens, max_new_tokens=max_new_tokens) for prompt in prompts]
    length = max(len(text.ids) for text in texts)
    target = FloatTarget(pair, length)
    drafter = FloatDrafter(pair, length, target.values[lookup_name("embedder")])
    stored = stored_weights(session.bundle)
    on_stage("the bundle against the float model")
    agreement, hops, divergences = Agreement(), _Hops(target, stored), []
    drafts = _Drafts(drafter, session)
    for text, said in zip(texts, target.said([text.ids for text in texts]), strict=True):
        observed = observe(session, text)
        agreement.add(said.logits, observed.logits, text.ids, text.start)
        divergences.append(divergence(text.name, said.logits, text.ids, text.start))
        hops.add(text, said, observed)
        drafts.add(text, said, observed)
    on_stage("weights")
    errors = _weight_errors(target, drafter, stored)
    values = target_values(stored)
    on_stage("layer by layer")
    layers, weights_kl = _layer_effects(target, values, texts[:_LAYER_TEXTS])
    on_stage("structured output")
    return Quality(
        texts=len(texts),
        tokens=agreement.tokens,
        kl_per_token=agreement.kl_per_token,
        weights_kl_per_token=weights_kl,
        top1_agreement=agreement.top1,
        float_perplexity=agreement.float_perplexity,
        perplexity=agreement.perplexity,
        divergences=tuple(divergences),
        hops=hops.values(),
        weights=errors,
        layers=layers,
        drafter=drafts.quality(),
        structured=_structured(session, target, prompts, texts),
    )


def target_values(stored: Mapping[str, Mapping[str, StoredWeight]]) -> dict[str, Parameter]:
    """A bundle's weights under the names that a FloatTarget has for them."""
    tables = {lookup_name(role): next(iter(as_values(stored[role]).values())) for role in LOOKUPS}
    return as_values(stored["target"]) | tables


def layer_of(name: str) -> str:
    """The part of the target that a parameter belongs to: a layer, a table, or the head."""
    words = name.split(".")
    if words[0] == "layers":
        return f"layer {words[1]}"
    return {"embed_tokens": "head"}.get(words[0], words[0])


class _Hops:
    """Relative errors of what a bundle lets be seen of its inside."""

    def __init__(self, target: FloatTarget, stored: Mapping[str, Mapping[str, StoredWeight]]) -> None:
        self._errors: dict[str, RelativeError] = {}
        values = target_values(stored)
        for role in LOOKUPS:
            name = lookup_name(role)
            self._add(name, *(_sample(p) for p in (target.values[name], values[name])))

    def _add(self, name: str, reference: NDArray[np.float32], found: NDArray[np.float32]) -> None:
        self._errors.setdefault(name, RelativeError()).add(reference, found)

    def add(self, text: Text, said: Said, observed: Observed) -> None:
        for name, rows in observed.caches.items():
            kept = rows.shape[2]  # a short pool keeps the last rows only
            self._add(name, said.caches[name][:, :, -kept:].numpy(), rows)
        self._add("activations", said.activations, observed.activations)
        self._add("logits", said.logits, observed.logits)

    def values(self) -> dict[str, float]:
        return {name: error.value for name, error in self._errors.items()}


class _Drafts:
    """The drafter, on the bundle's own rows and activations, so that errors of the target do not count."""

    def __init__(self, drafter: FloatDrafter, session: Session) -> None:
        self.drafter, self.depth = drafter, session.manifest.num_draft_tokens
        self.offset = session.manifest.drafter_position_offset
        self.projected = (RelativeError(), RelativeError())
        self.scores = RelativeError()
        self.same = self.candidates = 0
        self.accepted: list[int] = []
        self.float_same_rounds: list[int] = []
        self.float_accepted: tuple[list[int], list[int]] = ([], [])

    def add(self, text: Text, said: Said, observed: Observed) -> None:
        if not observed.rounds:
            return
        drafter, top_k = self.drafter, self.drafter.spec.head.top_k
        first = text.start
        tokens = text.ids[first:]
        caches = {name: torch.from_numpy(np.ascontiguousarray(rows)) for name, rows in observed.caches.items()}
        states = torch.from_numpy(observed.activations[first - 1 : -1])
        hidden = {}
        for offset in (0, 1):
            found, projected = drafter.step(tokens, states, _whole(caches, len(text.ids)), first, offset)
            hidden[offset] = found
            for one in observed.rounds:
                self.projected[offset].add(projected[one.filled - first].numpy(), one.activations)
        choices = observed.logits.argmax(-1)
        best = int(self.projected[1].value < self.projected[0].value)
        for one in observed.rounds:
            state = hidden[best][one.filled - first]
            wanted = drafter.ordering[drafter.clusters(state[None], top_k)[0]].reshape(-1).numpy()
            self.same += int(np.isin(one.candidates, wanted).sum())
            self.candidates += len(wanted)
            scores = (drafter.embedding[torch.from_numpy(one.candidates).long()] @ state).numpy()
            self.scores.add(scores - scores.mean(), one.scores - one.scores.mean())
            self.accepted.append(accepted(one.drafts, one.filled, text.ids, choices))
        self._count_float(text, said, {one.filled for one in observed.rounds})

    def _count_float(self, text: Text, said: Said, filled: Collection[int]) -> None:
        """How the float pair would draft after every token of the answer, with either convention."""
        choices, first = said.logits.argmax(-1), text.start
        for offset in (0, 1):
            tokens, states = list(text.ids[first:]), torch.from_numpy(said.activations[first - 1 : -1])
            chains: list[list[int]] = []
            for _ in range(self.depth):
                hidden, states = self.drafter.step(tokens, states, said.caches, first, offset)
                tokens = self.drafter.best(hidden, self.drafter.spec.head.top_k)
                chains.append(tokens)
            for at, drafts in enumerate(zip(*chains, strict=True), first):
                count = accepted(drafts, at, text.ids, choices)
                self.float_accepted[offset].append(count)
                if offset == self.offset and at in filled:
                    self.float_same_rounds.append(count)

    def quality(self) -> DrafterQuality:
        rounds = len(self.accepted)
        differences = np.subtract(*map(np.asarray, self.float_accepted)) if rounds else np.zeros(1)
        return DrafterQuality(
            rounds=rounds,
            error_by_offset=(self.projected[0].value, self.projected[1].value),
            same_candidates=self.same / max(1, self.candidates),
            score_error=self.scores.value,
            accepted_per_round=_mean(self.accepted),
            float_same_rounds=_mean(self.float_same_rounds),
            float_accepted_per_round=(_mean(self.float_accepted[0]), _mean(self.float_accepted[1])),
            float_rounds=len(differences),
            float_difference_error=float(differences.std() / math.sqrt(len(differences))),
            num_draft_tokens=self.depth,
        )


def _whole(caches: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Caches with the rows that a short pool has dropped as zeros: no window reaches them."""
    return {n: torch.nn.functional.pad(c, (0, 0, length - c.shape[2], 0)) for n, c in caches.items()}


def _mean(counts: Sequence[int]) -> float:
    return float(np.mean(counts)) if counts else 0.0


def _sample(parameter: Parameter) -> NDArray[np.float32]:
    """Rows of a parameter, evenly over it. Shapes: -> [N, columns]"""
    count = parameter.shape[0]
    if count <= _MOST_ROWS:
        return np.asarray(parameter.rows(0, count)).reshape(count, -1)
    starts = np.linspace(0, count - 1, _MOST_ROWS).astype(int)
    return np.concatenate([parameter.rows(i, i + 1) for i in starts.tolist()]).reshape(_MOST_ROWS, -1)


def _weight_errors(
    target: FloatTarget, drafter: FloatDrafter, stored: Mapping[str, Mapping[str, StoredWeight]]
) -> tuple[WeightError, ...]:
    """Every stored weight against the checkpoint's, the worst first."""
    bits = {name: weight.bits for name, weight in stored["target"].items()}
    bits |= {lookup_name(role): next(iter(stored[role].values())).bits for role in LOOKUPS}
    errors = [
        _weight_error(name, bits[name], _sample(target.values[name]), _sample(parameter))
        for name, parameter in target_values(stored).items()
        if name in target.values
    ]
    for name, weight in with_row_scales(stored["drafter"]).items():
        reference = drafter.weight(name)
        rows = weight.parameter.rows(0, weight.parameter.shape[0]).astype(np.float32)
        errors.append(_weight_error(f"drafter: {name}", weight.bits, reference, rows))
    return tuple(sorted(errors, key=lambda error: -max(error.rows_off, error.error)))


def _weight_error(name: str, bits: int, reference: NDArray[np.float32], found: NDArray[np.float32]) -> WeightError:
    rows, other = (array.reshape(len(array), -1).astype(np.float64) for array in (reference, found))
    error = RelativeError()
    error.add(reference.reshape(len(reference), -1), found.reshape(len(found), -1))
    squares = np.square(rows).sum(-1)
    gains = np.divide((rows * other).sum(-1), squares, out=np.ones(len(rows)), where=squares > 0)
    off = np.abs(gains - 1) > _GAIN_OFF
    gain = float(np.median(gains[off])) if off.any() else float((rows * other).sum() / max(squares.sum(), 1e-30))
    return WeightError(name=name, bits=bits, error=error.value, gain=gain, rows_off=float(off.mean()))


def _layer_effects(target: FloatTarget, values: Values, texts: Sequence[Text]) -> tuple[tuple[LayerEffect, ...], float]:
    """What each layer's weights alone change, the worst first; and what all of them do together."""
    ids = [text.ids for text in texts]
    reference = [said.logits for said in target.said(ids)]

    def kl(names: Sequence[str]) -> float:
        agreement = Agreement()
        replaced = {name: values[name] for name in names}
        for text, expected, said in zip(texts, reference, target.said(ids, replaced), strict=True):
            agreement.add(expected, said.logits, text.ids, text.start)
        return agreement.kl_per_token

    groups: dict[str, list[str]] = {}
    for name in values:
        if name in target.values:
            groups.setdefault(layer_of(name), []).append(name)
    effects = [LayerEffect(layer=layer, kl=kl(names)) for layer, names in groups.items()]
    together = kl([name for names in groups.values() for name in names])
    return tuple(sorted(effects, key=lambda effect: -effect.kl)), together


def _structured(session: Session, target: FloatTarget, prompts: Sequence[Prompt], texts: Sequence[Text]) -> Structured:
    """Answers that should be JSON or tool calls; the float model's are its own, found with the bundle's as drafts."""
    asked = [(p, t) for p, t in zip(prompts, texts, strict=True) if p.expects]
    float_valid, valid, lost = 0, 0, []
    for prompt, text in asked:
        answers = [float_answer(session, target, text), text.ids[text.start :]]
        first, second = (
            is_valid(session.tokenizer.decode(ids, skip_special_tokens=False), prompt.expects, prompt.opened)
            for ids in answers
        )
        float_valid, valid = float_valid + first, valid + second
        if first and not second:
            lost.append(prompt.id)
    return Structured(prompts=len(asked), float_valid=float_valid, valid=valid, lost=tuple(lost))


def float_answer(session: Session, target: FloatTarget, text: Text) -> tuple[int, ...]:
    """What the float model says greedily, as long as the bundle's answer or shorter.

    The bundle drafts all that is left, one pass of the float model keeps what it would have said itself and adds its
    own token, and so on: speculative decoding with the quantised model as the drafter.
    """
    ids, end = list(text.ids), len(text.ids)
    settled = text.start
    stops, suppressed = session.manifest.stop_token_ids, list(session.manifest.suppress_tokens)
    while settled < end:
        (said,) = target.said([ids])
        logits = said.logits.copy()
        logits[:, suppressed] = -np.inf
        choices = logits.argmax(-1)
        while settled < len(ids) and ids[settled] == choices[settled - 1]:
            settled += 1
        if settled == len(ids):
            break
        ids = [*ids[:settled], int(choices[settled - 1])]
        settled += 1
        if ids[-1] in stops or settled >= end:
            break
        ids += session.generate(ids, max_new_tokens=end - settled).finish().tokens
    return tuple(ids[text.start :])
