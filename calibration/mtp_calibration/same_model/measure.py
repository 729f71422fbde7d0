"""Is a bundle still the same model? Its hops and its whole, run by mtp_runtime, against its checkpoint in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mtp_calibration.same_model.bundle_weights import stored_weights
from mtp_calibration.same_model.drafts import DraftComparison
from mtp_calibration.same_model.float_pair import (
    LOOKUPS,
    FloatDrafter,
    FloatTarget,
    TargetOutputs,
    Values,
    lookup_name,
)
from mtp_calibration.same_model.metrics import Agreement, RelativeError, divergence
from mtp_calibration.same_model.observe import Observed, Text, continued, observe
from mtp_calibration.same_model.quality import LayerEffect, Quality
from mtp_calibration.same_model.structured_answers import structured_answers
from mtp_calibration.same_model.weight_errors import sample, target_values, weight_errors
from mtp_export.check.prompts import Prompt
from mtp_export.source.pair import Pair
from mtp_export.weights.stored import StoredWeight
from mtp_runtime import Session

_LAYER_TEXTS = 4  # on which the effect of single layers is measured


def measure(
    session: Session,
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    max_new_tokens: int,
    on_stage: Callable[[str], None] = lambda name: None,
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
    drafts = DraftComparison(drafter, session)
    for text, expected in zip(texts, target.outputs([text.ids for text in texts]), strict=True):
        observed = observe(session, text)
        agreement.add(expected.logits, observed.logits, text.ids, text.start)
        divergences.append(divergence(text.name, expected.logits, text.ids, text.start))
        hops.add(expected, observed)
        drafts.add(text, expected, observed)
    on_stage("weights")
    errors = weight_errors(target, drafter, stored)
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
        structured=structured_answers(session, target, prompts, texts),
    )


def layer_of(name: str) -> str:
    """Return the part of the target that a parameter belongs to: a layer, a table, or the head."""
    words = name.split(".")
    if words[0] == "layers":
        return f"layer {words[1]}"
    return {"embed_tokens": "head"}.get(words[0], words[0])


class _Hops:
    """Relative errors of the values that a bundle shows of its inside."""

    def __init__(self, target: FloatTarget, stored: Mapping[str, Mapping[str, StoredWeight]]) -> None:
        self._errors: dict[str, RelativeError] = {}
        values = target_values(stored)
        for role in LOOKUPS:
            name = lookup_name(role)
            self._add(name, *(sample(p) for p in (target.values[name], values[name])))

    def _add(self, name: str, reference: NDArray[np.float32], result: NDArray[np.float32]) -> None:
        self._errors.setdefault(name, RelativeError()).add(reference, result)

    def add(self, expected: TargetOutputs, observed: Observed) -> None:
        for name, whole in expected.caches.items():  # of a bundle's, that of a ring's positions is none of the model's
            rows = observed.caches[name]
            kept = rows.shape[2]  # a short pool keeps the last rows only
            self._add(name, whole[:, :, -kept:].numpy(), rows)
        self._add("activations", expected.activations, observed.activations)
        self._add("logits", expected.logits, observed.logits)

    def values(self) -> dict[str, float]:
        return {name: error.value for name, error in self._errors.items()}


def _layer_effects(target: FloatTarget, values: Values, texts: Sequence[Text]) -> tuple[tuple[LayerEffect, ...], float]:
    """Return the effect of each layer's weights alone, the worst first, and the KL per token of all of them."""
    ids = [text.ids for text in texts]
    reference = [outputs.logits for outputs in target.outputs(ids)]

    def kl(names: Sequence[str]) -> float:
        agreement = Agreement()
        replaced = {name: values[name] for name in names}
        for text, expected, outputs in zip(texts, reference, target.outputs(ids, replaced), strict=True):
            agreement.add(expected, outputs.logits, text.ids, text.start)
        return agreement.kl_per_token

    groups: dict[str, list[str]] = {}
    for name in values:
        if name in target.values:
            groups.setdefault(layer_of(name), []).append(name)
    effects = [LayerEffect(layer=layer, kl=kl(names)) for layer, names in groups.items()]
    together = kl([name for names in groups.values() for name in names])
    return tuple(sorted(effects, key=lambda effect: -effect.kl)), together
