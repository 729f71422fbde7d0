"""The quality of a bundle against the float pair that it was made from, as values."""

from __future__ import annotations

import msgspec

from mtp_calibration.same_model.metrics import Divergence


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
