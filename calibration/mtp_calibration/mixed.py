"""A mixed recipe under a size: a recipe's formats, and fewer bits where they cost least.

Each part of the target is quantised alone, and how far the float model's distribution moves is what that costs. From
the smallest formats, the change that takes most KL off for a byte comes next, until the size is reached. KLs of parts
are taken to add up, and 8 bits to cost what the squares of the steps say: a 329th of 4 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from mtp_calibration.float_pair import LOOKUPS, FloatTarget, lookup_name, with_format
from mtp_calibration.metrics import Agreement
from mtp_calibration.recipes import FLOAT32, INT4, INT8, WeightFormat
from mtp_export.pipeline import Pair
from mtp_export.weights import Parameter

_FINER = (127 / 7) ** 2
_TABLE_INT2 = WeightFormat(bits=2, block_size=0, scale="fitted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters, by their graph's role and their name, that get one format. costs: KL per token by format, the smallest
    format first."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    costs: tuple[tuple[WeightFormat, float], ...]


def measured_parts(
    pair: Pair,
    values: Mapping[str, Mapping[str, Parameter]],
    texts: Sequence[Sequence[int]],
    on_part: Callable[[str], None] = lambda name: None,
) -> list[Part]:
    """The parts of a target with what each format costs on the texts."""
    target = FloatTarget(pair, max(len(ids) for ids in texts))
    reference = [said.logits for said in target.said(texts)]

    def kl(names: Sequence[str], format: WeightFormat) -> float:
        agreement = Agreement()
        replaced = {name: with_format(target.values[name], format) for name in names}
        for ids, expected, said in zip(texts, reference, target.said(texts, replaced), strict=True):
            agreement.add(expected, said.logits, ids, len(ids))
        return agreement.kl_per_token

    found = []
    for name, parameters in grouped(values).items():
        on_part(name)
        role, first = parameters[0]
        own = values[role][first].format
        measured = [lookup_name(role) if role in LOOKUPS else parameter for role, parameter in parameters]
        smaller = [_TABLE_INT2] if name == "per_layer_embedder" else []
        smaller = [format for format in (*smaller, INT4, INT8) if format.bits < own.bits]
        costs = {format.bits: kl(measured, format) for format in smaller if format.bits < INT8.bits}
        costs |= {8: costs.get(4, 0.0) / _FINER, FLOAT32.bits: 0.0}
        if own.bits not in costs:
            costs[own.bits] = kl(measured, own)
        ladder = tuple((format, costs[format.bits]) for format in (*smaller, own))
        found.append(Part(name=name, parameters=tuple(parameters), costs=ladder))
    return found


def grouped(values: Mapping[str, Mapping[str, Parameter]]) -> dict[str, list[tuple[str, str]]]:
    """The parameters that get a format together: a layer's attention, its feed-forward block, each table, the head."""
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
    return groups


def chosen(parts: Sequence[Part], most_bytes: int, size: Callable[[Part, WeightFormat], int]) -> dict[str, WeightFormat]:
    """The format of each part, by name: so many bytes together at most, as long as the smallest formats take fewer."""
    levels = dict.fromkeys((part.name for part in parts), 0)
    left = most_bytes - sum(size(part, part.costs[0][0]) for part in parts)
    while True:
        steps = []
        for part in parts:
            level = levels[part.name]
            for finer in range(level + 1, len(part.costs)):
                more = size(part, part.costs[finer][0]) - size(part, part.costs[level][0])
                if more <= left:
                    steps.append(((part.costs[level][1] - part.costs[finer][1]) / more, part.name, finer, more))
        if not steps:
            return {part.name: part.costs[levels[part.name]][0] for part in parts}
        _, name, finer, more = max(steps)
        levels[name], left = finer, left - more
