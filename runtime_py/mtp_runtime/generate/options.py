"""How to generate: one frozen value, and its fields as the keyword arguments of `Session.generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal, TypedDict

from mtp_runtime.generate.sampling import Constraint, Sampling
from mtp_runtime.text.stop_strings import check_stop_strings

Depth = int | Literal["auto"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to generate. By default greedily, with the graph's own K, to a stop id or the end of the context.

    max_new_tokens: the most tokens to commit; without it the context is the limit.
    num_draft_tokens: 0 is plain decoding, "auto" drafts as many in each round as have paid so far, None is the
        graph's own K.
    stop: a text, or texts, at which to end.
    stop_token_ids: token ids at which to end; None takes the manifest's.
    keep_length: so many leading prompt tokens are in the cache from the generation before.
    with_margins: record how far each greedy choice was from a tie.
    sampling: how tokens are drawn; "checkpoint" draws as the checkpoint's generation_config.json says, None is greedy.
    constraint: called with the output's tokens before each committed one; returns which tokens may follow, [V], or
        None for all.

    Raises:
        UserError: a stop text is empty.
    """

    max_new_tokens: int | None = None
    num_draft_tokens: Depth = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Collection[int] | None = None
    keep_length: int = 0
    with_margins: bool = False
    sampling: Sampling | Literal["checkpoint"] | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        """Refuse stop texts that mean nothing; the request is checked against the bundle at the first token."""
        check_stop_strings(self.stop)


class OptionChanges(TypedDict, total=False):
    """The fields of `GenerationOptions` as keyword arguments."""

    max_new_tokens: int | None
    num_draft_tokens: Depth
    stop: str | Sequence[str]
    stop_token_ids: Collection[int] | None
    keep_length: int
    with_margins: bool
    sampling: Sampling | Literal["checkpoint"] | None
    constraint: Constraint | None


def with_changes(options: GenerationOptions | None, changes: OptionChanges) -> GenerationOptions:
    """Return `options`, by default the defaults, with some fields changed.

    Raises:
        TypeError: a change has a name that no option has.
        UserError: a stop text is empty.
    """
    names = {field.name for field in dataclasses.fields(GenerationOptions)}
    unknown = sorted(changes.keys() - names)
    if unknown:
        raise TypeError(f"there is no option {unknown[0]!r} of a generation: give one of {', '.join(sorted(names))}")
    return dataclasses.replace(options or GenerationOptions(), **changes)
