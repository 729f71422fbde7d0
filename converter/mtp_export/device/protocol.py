"""The request to a place and its answer: JSON files, the same for every place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from mtp_export.check.stock_runtime import StockRun
from mtp_runtime.generate.trace import GenerationTrace
from mtp_runtime.measure.teacher_forcing import FixedText, Reading

Where = Literal["host", "arm64-emulated", "phone"]
Runtime = Literal["mtp_runtime", "LiteRT-LM"]
Processor = Literal["cpu", "gpu"]


class TextPrompt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt and the kind of text it is."""

    id: str
    kind: str
    text: str


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Run `prompts` greedily through each of `runtimes`, with each of `depths` drafts a round (0: without MTP).

    `bundle` is a folder on the machine that runs it; `container` the `.litertlm` in it, for LiteRT-LM, which runs it on
    `backend`; the reference runtime has the CPU alone. Both have a context of `context_length` tokens. The reference
    runtime also reads `texts` by teacher forcing: None for its own outputs without MTP, empty for none.
    """

    bundle: str
    container: str | None
    prompts: tuple[TextPrompt, ...]
    max_new_tokens: int
    depths: tuple[int, ...]
    runtimes: tuple[Runtime, ...]
    backend: Processor
    threads: int
    context_length: int
    texts: tuple[FixedText, ...] | None = ()


class PlaceDescription(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where it ran. `emulator` is None on real hardware; timings of an emulated place say nothing about speed."""

    where: Where
    machine: str
    cpu: str
    system: str
    emulator: str | None
    versions: dict[str, str]


class OfPlace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every report on a bundle begins with: where it ran, and which model by which recipe."""

    place: PlaceDescription
    model: str
    recipe: str


class TraceRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The reference runtime's traces, one a prompt, with `num_draft_tokens` drafts a round."""

    num_draft_tokens: int
    traces: tuple[GenerationTrace, ...]


class StockAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Stock LiteRT-LM's run, without MTP (0) or with the bundle's K."""

    num_draft_tokens: int
    run: StockRun


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a place answers to a `Request`. `readings` has one for each text."""

    place: PlaceDescription
    traces: tuple[TraceRun, ...] = ()
    stock: tuple[StockAnswer, ...] = ()
    readings: tuple[Reading, ...] = ()

    @property
    def plain(self) -> tuple[GenerationTrace, ...]:
        """The reference runtime's traces without MTP, empty where it did not run."""
        return next((run.traces for run in self.traces if run.num_draft_tokens == 0), ())


def text_prompts(prompts: Sequence[object]) -> tuple[TextPrompt, ...]:
    """Return prompts with the fields that a place needs, and no others."""
    return tuple(msgspec.convert(prompt, TextPrompt, from_attributes=True) for prompt in prompts)
