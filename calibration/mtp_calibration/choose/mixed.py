"""A mixed recipe under a size: a recipe's formats, and fewer bits where they cost least.

Each part of the target is quantised alone. Its cost is how far the float model's distribution moves. From
the smallest formats, the change that takes most KL off for a byte comes next, until the size is reached. KLs of parts
are taken to add up, and 8 bits to cost as the squares of the steps do: a 329th of 4 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from mtp_calibration.same_model.float_pair import LOOKUPS, FloatTarget, lookup_name, with_format
from mtp_calibration.same_model.metrics import Agreement
from mtp_export.source.pair import Pair
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.recipes import FLOAT32, INT4, INT8, WeightFormat

_FINER = (127 / 7) ** 2
_TABLE_INT2 = WeightFormat(bits=2, block_size=0, scale="fitted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters, by their graph's role and their name, that get one format; which formats, the smallest first."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    formats: tuple[WeightFormat, ...]


def parts_of(values: Mapping[str, Mapping[str, Parameter]]) -> list[Part]:
    """Return the parts: a layer's attention, its feed-forward block, each table, the head.

    The formats of a part are its own, and those of fewer bits.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for role in ("target", *LOOKUPS):
        for name, parameter in values[role].items():
            if len(parameter.shape) < 2 or parameter.stored:
                continue
            words = name.split(".")
            part = role if role in LOOKUPS else "head" if words[0] == "embed_tokens" else words[0]
            if words[0] == "layers":
                part = f"layer {words[1]} {'attention' if words[2] == 'self_attn' else 'feed-forward'}"
            groups.setdefault(part, []).append((role, name))
    parts = []
    for part, parameters in groups.items():
        role, first = parameters[0]
        own = values[role][first].format
        smaller = (_TABLE_INT2, INT4, INT8) if part == "per_layer_embedder" else (INT4, INT8)
        formats = (*(format for format in smaller if format.bits < own.bits), own)
        parts.append(Part(name=part, parameters=tuple(parameters), formats=formats))
    return parts


def measured(
    pair: Pair,
    parts: Sequence[Part],
    texts: Sequence[Sequence[int]],
    on_part: Callable[[str], None] = lambda name: None,
) -> dict[str, tuple[float, ...]]:
    """Return the KL per token on the texts with each part alone in each of its formats, by its name."""
    target = FloatTarget(pair, max(len(ids) for ids in texts))
    reference = [outputs.logits for outputs in target.outputs(texts)]

    def kl(part: Part, format: WeightFormat) -> float:
        agreement = Agreement()
        names = [lookup_name(role) if role in LOOKUPS else name for role, name in part.parameters]
        replaced = {name: with_format(target.values[name], format) for name in names}
        for ids, expected, outputs in zip(texts, reference, target.outputs(texts, replaced), strict=True):
            agreement.add(expected, outputs.logits, ids, len(ids))
        return agreement.kl_per_token

    costs = {}
    for part in parts:
        on_part(part.name)
        few = {format.bits: kl(part, format) for format in part.formats if format.bits < INT8.bits}
        known = {INT8.bits: few.get(4, 0.0) / _FINER, FLOAT32.bits: 0.0} | few
        costs[part.name] = tuple(known[format.bits] for format in part.formats)
    return costs


def chosen(
    parts: Sequence[Part],
    costs: Mapping[str, Sequence[float]],
    most_bytes: int,
    size: Callable[[Part, WeightFormat], int],
) -> dict[str, WeightFormat]:
    """Return the format of each part, by name.

    Together they take at most `most_bytes`, as long as the smallest formats take fewer.
    """
    levels = dict.fromkeys((part.name for part in parts), 0)
    left = most_bytes - sum(size(part, part.formats[0]) for part in parts)
    while True:
        steps = []
        for part in parts:
            level, of_part = levels[part.name], costs[part.name]
            for finer in range(level + 1, len(part.formats)):
                more = size(part, part.formats[finer]) - size(part, part.formats[level])
                if more <= left:
                    steps.append(((of_part[level] - of_part[finer]) / more, part.name, finer, more))
        if not steps:
            return {part.name: part.formats[levels[part.name]] for part in parts}
        _, name, finer, more = max(steps)
        levels[name], left = finer, left - more
