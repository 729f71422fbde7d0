"""Teacher forcing: one text is fed to two machines, and their logits are compared at every token.

Two processors round differently, so their own outputs part at a near-tie and say nothing from there on. A text that is
fed to both has no such end: every position is compared. A position where the first choices differ is judged by the one
rule for near-ties (parity.py), with the margin of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from mtp_runtime.bundle.contract import Manifest
from mtp_runtime.errors import ContextFullError
from mtp_runtime.generate.backend import Backend, FloatArray
from mtp_runtime.measure.parity import Comparison

NUM_CANDIDATES = 8  # tokens whose logits are compared at a position: those that greedy decoding or sampling may take


class FixedText(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt and the `tokens` that are fed after it.

    `candidates` are, for each of these tokens, the ids whose logits are read at its position; empty for the reader's
    own highest ones.

    Shapes: candidates [T, C] or empty.
    """

    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...] = ()


class Reading(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a target predicts at each token of a fixed text: its first choice, and the logits of the candidates.

    Shapes: choices [T], candidates [T, C], logits [T, C].
    """

    choices: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    logits: tuple[tuple[float, ...], ...]

    @property
    def margins(self) -> tuple[float, ...]:
        """The highest logit minus the second at each position, where the candidates are the reader's own."""
        return tuple(row[0] - row[1] for row in self.logits)


class Distances(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the logits of two readings are apart, in logits: of each position the largest distance of a candidate,
    and of these the median, the 99th percentile and the largest. None where there is no position."""

    positions: int
    median: float | None
    p99: float | None
    largest: float | None


def read_fixed(backend: Backend, manifest: Manifest, text: FixedText) -> Reading:
    """Feed `text` to the target and read its logits at every token after the prompt. The cache holds the text then.

    Raises:
        ContextFullError: the text does not fit the bundle's context.
    """
    count = len(text.prompt_ids) + len(text.tokens)
    if count > manifest.context_length:
        raise ContextFullError(f"a text of {count} tokens does not fit the context of {manifest.context_length}")
    cache, size = backend.kv_cache, manifest.num_draft_tokens + 1
    cache.rewind(0)
    if len(text.prompt_ids) > 1:
        backend.prefill(text.prompt_ids[:-1])
    fed = (text.prompt_ids[-1], *text.tokens[:-1]) if text.tokens else ()
    choices: list[int] = []
    candidates: list[tuple[int, ...]] = []
    logits: list[tuple[float, ...]] = []
    for start in range(0, len(fed), size):
        rows = backend.verify(fed[start : start + size]).logits
        cache.advance(len(rows))
        for row in rows:
            position = len(choices)
            ids = text.candidates[position] if text.candidates else _highest(row)
            choices.append(int(row.argmax()))
            candidates.append(ids)
            logits.append(tuple(row[list(ids)].tolist()))
    return Reading(choices=tuple(choices), candidates=tuple(candidates), logits=tuple(logits))


def distances(pairs: Sequence[tuple[Reading, Reading]]) -> Distances:
    """Measure how far the readings of each pair are apart, over the positions of all of them."""
    rows = [
        np.abs(np.subtract(expected.logits, reading.logits)).max(axis=1)
        for expected, reading in pairs
        if expected.choices
    ]
    if not rows:
        return Distances(positions=0, median=None, p99=None, largest=None)
    largest = np.concatenate(rows)
    median, p99 = (float(value) for value in np.quantile(largest, (0.5, 0.99)))
    return Distances(positions=len(largest), median=median, p99=p99, largest=float(largest.max()))


def compare_readings(prompt: str, expected: Reading, reading: Reading, *, tolerance: float) -> Comparison:
    """Judge the first choices of a reading at every position of the reference's own, `expected`.

    The position that is named is the one whose difference has the largest margin: it decides the verdict.

    Raises:
        ValueError: the readings are of different texts.
    """
    if expected.candidates != reading.candidates:
        raise ValueError(f"{prompt}: the readings have different candidates")
    margins = expected.margins
    parted = [at for at, pair in enumerate(zip(expected.choices, reading.choices, strict=True)) if pair[0] != pair[1]]
    compared = len(expected.choices)
    if not parted:
        return Comparison(
            prompt=prompt, compared=compared, agreed=compared, first_difference=None, margin=None, verdict="equal"
        )
    worst = max(parted, key=margins.__getitem__)
    return Comparison(
        prompt=prompt,
        compared=compared,
        agreed=compared - len(parted),
        first_difference=worst,
        margin=margins[worst],
        verdict="near_tie" if margins[worst] <= tolerance else "different",
    )


def _highest(row: FloatArray) -> tuple[int, ...]:
    """Return the ids of the highest logits, the highest first; of equal ones the lower id, as argmax takes it.

    Shapes: row [V].
    """
    count = min(NUM_CANDIDATES, len(row))
    near = np.flatnonzero(row >= np.partition(row, -count)[-count])
    return tuple(near[np.argsort(-row[near], kind="stable")][:count].tolist())
