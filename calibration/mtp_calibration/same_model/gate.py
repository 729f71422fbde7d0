"""The gate: bars that a bundle must clear, and the diagnosis where it does not.

A diagnosis states the most definite fault: a stored weight that is not the checkpoint's comes before a
distribution that has moved, and a graph that contradicts its manifest before drafts that are not accepted.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from mtp_calibration.same_model.quality import DrafterQuality, Quality, WeightError
from mtp_runtime.bundle.contract import Manifest

Part = Literal["target", "drafter", "clustered head", "position", "structured output"]

_NAMED = 3  # worst layers that are named
# Relative error of a stored weight that rounding to so many bits can explain; measured on nano: 0.009, 0.16 and 0.45.
_ROUNDING = {32: 1e-5, 16: 1e-3, 8: 0.03, 4: 0.25, 2: 0.6}
_ROWS_OFF = 0.02  # share of rows with a factor of their own
# An int8 drafter is within 0.02 of the float one with its own position, and 0.05 away from it with the other.
_DRAFTER_ERROR = 0.1
_CLEARLY = 0.7  # the smaller error must be below this part of the larger one
_SAME_CANDIDATES = 0.9
_SCORE_ERROR = 0.1
_DEVIATIONS = 3.0  # standard errors by which a position convention must be better


class Bars(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle must reach. Perplexity as the bundle's over the float model's; accepted drafts per round as a share
    of the float pair's."""

    kl_per_token: float
    top1_agreement: float
    perplexity_ratio: float
    accepted_share: float


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong, and what to do."""

    part: Part
    diagnosis: str
    remedy: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome: bars, the ones that were missed in words, and the findings."""

    bars: Bars
    missed: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no bar is missed and nothing is wrong."""
        return not self.missed and not self.findings

    @property
    def summary(self) -> str:
        """One line: the findings where there are any, else the missed bars."""
        findings = [f"{finding.part}: {finding.diagnosis}: {finding.remedy}" for finding in self.findings]
        return "; ".join(findings or self.missed)


def bars_for(recipe: str) -> Bars:
    """Return the bars of a recipe; mixed recipes and those of 4 and 2 bits share theirs."""
    if recipe == "f32":
        return Bars(kl_per_token=1e-4, top1_agreement=0.999, perplexity_ratio=1.001, accepted_share=0.98)
    if recipe == "int8":
        return Bars(kl_per_token=0.02, top1_agreement=0.95, perplexity_ratio=1.02, accepted_share=0.95)
    return Bars(kl_per_token=0.25, top1_agreement=0.8, perplexity_ratio=1.25, accepted_share=0.9)


def judge(quality: Quality, manifest: Manifest, bars: Bars) -> Verdict:
    """Hold the quality against the bars, and diagnose what is wrong."""
    missed = _missed(quality, bars)
    weights = [w for w in quality.weights if is_wrong(w)]
    findings = [*_target_findings(quality, weights, missed), *_drafter_findings(quality.drafter, weights, manifest)]
    if quality.structured.lost:
        findings.append(
            Finding(
                part="structured output",
                diagnosis=f"{len(quality.structured.lost)} of {quality.structured.float_valid} answers that are valid "
                f"in float are not any more ({', '.join(quality.structured.lost[:_NAMED])})",
                remedy="take a finer --recipe",
            )
        )
    return Verdict(bars=bars, missed=tuple(missed), findings=tuple(findings))


def is_wrong(weight: WeightError) -> bool:
    """Whether a stored weight is something else than the checkpoint's, rounded."""
    return weight.error > _ROUNDING[weight.bits] or (weight.rows_off > _ROWS_OFF and weight.bits >= 4)


def _missed(quality: Quality, bars: Bars) -> list[str]:
    ratio = quality.perplexity / quality.float_perplexity
    drafter = quality.drafter
    share = drafter.accepted_per_round / drafter.float_same_rounds if drafter.float_same_rounds else 1.0
    rows = (
        ("KL per token", quality.kl_per_token, bars.kl_per_token, False),
        ("same first choice", quality.top1_agreement, bars.top1_agreement, True),
        ("perplexity against float", ratio, bars.perplexity_ratio, False),
        ("accepted drafts against float", share, bars.accepted_share, True),
    )
    return [
        f"{name} is {value:.4g}, expected {'at least' if least else 'at most'} {bar:.4g}"
        for name, value, bar, least in rows
        if (value < bar if least else value > bar)
    ]


def _target_findings(quality: Quality, weights: list[WeightError], missed: list[str]) -> list[Finding]:
    wrong = [weight for weight in weights if not weight.name.startswith("drafter: ")]
    findings = [_wrong_weight("target", weight) for weight in wrong[:_NAMED]]
    of_target = [text for text in missed if not text.startswith("accepted")]
    if findings or not of_target:
        return findings
    if quality.kl_per_token > 3 * quality.weights_kl_per_token:
        diagnosis = (
            f"KL per token is {quality.kl_per_token:.3g} and its weights explain {quality.weights_kl_per_token:.3g}: "
            "the graphs do not compute what their weights say"
        )
        return [Finding(part="target", diagnosis=diagnosis, remedy="export it again, and report it")]
    worst = ", ".join(f"{effect.layer} (KL {effect.kl:.3g})" for effect in quality.layers[:_NAMED])
    return [
        Finding(
            part="target",
            diagnosis=f"{'; '.join(of_target)}; worst layers: {worst}",
            remedy="take a finer --recipe, or lower the bar",
        )
    ]


def _wrong_weight(part: Part, weight: WeightError) -> Finding:
    name = weight.name.removeprefix("drafter: ")
    if weight.rows_off > _ROWS_OFF:
        diagnosis = f"{weight.rows_off:.0%} of the rows of {name} are {weight.gain:.3g} times the checkpoint's"
        if weight.gain > 0:
            diagnosis += ": their scales are wrong"
    else:
        diagnosis = f"{name} is not the checkpoint's: its relative error is {weight.error:.3g} at {weight.bits} bits"
    return Finding(part=part, diagnosis=diagnosis, remedy="export it again from this checkpoint")


def _drafter_findings(drafter: DrafterQuality, weights: list[WeightError], manifest: Manifest) -> list[Finding]:
    if not drafter.rounds:
        return []
    wrong = [weight for weight in weights if weight.name.startswith("drafter: ")]
    findings = _head_findings(drafter)
    findings += [_wrong_weight("drafter", weight) for weight in wrong if "masked_embedding" not in weight.name][:_NAMED]
    return findings + _position_findings(drafter, manifest.drafter_position_offset)


def _head_findings(drafter: DrafterQuality) -> list[Finding]:
    """Tell a wrong order of centroids from one of tokens: with the first, other clusters are chosen but their tokens
    have their own scores; with the second, tokens have the scores of others."""
    if drafter.same_candidates >= _SAME_CANDIDATES and drafter.score_error <= _SCORE_ERROR:
        return []
    if drafter.score_error <= _SCORE_ERROR:
        diagnosis = (
            f"{drafter.same_candidates:.0%} of the candidates are those of the float drafter, and their scores are "
            "right: the centroids are in another order than the clusters"
        )
    else:
        diagnosis = (
            f"the scores of candidates are off by {drafter.score_error:.2g}: token_ordering and the clustered table "
            "are in different orders"
        )
    return [Finding(part="clustered head", diagnosis=diagnosis, remedy="export it again from this drafter")]


def _position_findings(drafter: DrafterQuality, offset: int) -> list[Finding]:
    as_stated, other = drafter.error_by_offset[offset], drafter.error_by_offset[1 - offset]
    if other < _CLEARLY * as_stated and other < _DRAFTER_ERROR:
        return [
            Finding(
                part="position",
                diagnosis=f"the manifest says drafter_position_offset {offset} and the graph adds {1 - offset}",
                remedy="export it again",
            )
        ]
    gained = drafter.float_accepted_per_round[1 - offset] - drafter.float_accepted_per_round[offset]
    if gained > _DEVIATIONS * drafter.float_difference_error and gained > 0:
        return [
            Finding(
                part="position",
                diagnosis=f"this drafter was trained with the other position convention: {gained:.2f} more drafts a "
                f"round are accepted with offset {1 - offset} than with {offset}",
                remedy=f"export it with --drafter-position-offset {1 - offset}",
            )
        ]
    return []
