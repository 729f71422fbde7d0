"""What a user asks of an export."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from mtp_export.arch.published import PAIRS
from mtp_export.weights.recipes import RECIPES
from mtp_runtime.errors import UserError

EXPORT_FORMATS = ("tflite", "onnx")
DELEGATES = ("cpu", "gpu")
ROUNDINGS = ("nearest", "gptq")
_MAX_DRAFT_TOKENS = 16
_MAX_BATCH_SIZE = 8
MIN_CACHE_LENGTH = 32
_MAX_CACHE_LENGTH = 1 << 20  # a checkpoint says how far positions really go


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The options of `mtp-export export`; None stands for the model's default.

    target and drafter: local folders or Hugging Face ids. drafter_position_offset: 1 for transformers' position
    convention, 0 for vLLM's; it changes acceptance only. portable: ONNX in standard operations alone. batch_size: ONNX
    graphs for so many sequences in one pass, beside those for one. delegate: gpu keeps to operations that a GPU takes,
    and to one buffer of each cache there. composites: norms as operators of LiteRT-LM's GPU backend. gate: keep the
    bundle only if it is measured to be the same model still. rounding: of the target's matrices, to the nearest value
    or by GPTQ on `prompts` (None: those of the package). max_size_bytes: of what ships, fewer bits than the recipe's
    where they cost least on `prompts`. centroid_top_k: clusters that the head scores. measured: which of
    drafter_position_offset and centroid_top_k are what is best on `prompts`. chat_template: a file in place of the
    target's own.
    """

    model: str
    export_format: str
    target: str | None
    drafter: str | None
    recipe: str
    output: Path
    drafter_recipe: str | None = None
    cache_length: int | None = None
    num_draft_tokens: int | None = None
    drafter_position_offset: int = 1
    portable: bool = False
    batch_size: int = 1
    force: bool = False
    workers: int = 1
    embedder_recipe: str | None = None
    adapters: tuple[Path, ...] = ()
    delegate: str = "cpu"
    composites: bool = False
    gate: bool = False
    rounding: str = "nearest"
    prompts: Path | None = None
    max_size_bytes: int | None = None
    centroid_top_k: int | None = None
    measured: tuple[str, ...] = ()
    chat_template: Path | None = None

    def check(self) -> None:
        """Check all that can be checked before a checkpoint is opened.

        Raises:
            UserError: an option has no value of its kind, with the ones that it may have.
        """
        one_of("--model", self.model, PAIRS)
        one_of("--target", self.export_format, EXPORT_FORMATS)
        one_of("--recipe", self.recipe, RECIPES)
        one_of("--delegate", self.delegate, DELEGATES)
        one_of("--rounding", self.rounding, ROUNDINGS)
        if self.rounding == "gptq" and self.recipe in ("f32", "q4_0"):
            why = "nothing is rounded" if self.recipe == "f32" else "its weights must stay on their lattice"
            raise UserError(f"--rounding gptq with --recipe {self.recipe}: {why}: leave one of them out")
        unused = self.rounding != "gptq" and self.max_size_bytes is None and not self.measured
        if self.prompts is not None and unused:
            raise UserError("--prompts is for --rounding gptq, --max-size and what is auto, got none of them")
        for option, recipe in (("drafter", self.drafter_recipe), ("embedder", self.embedder_recipe)):
            if recipe is not None:
                one_of(f"--{option}-recipe", recipe, RECIPES)
        if self.cache_length is not None:
            in_range("--cache-length", self.cache_length, MIN_CACHE_LENGTH, _MAX_CACHE_LENGTH)
        if self.num_draft_tokens is not None:
            in_range("--num-draft-tokens", self.num_draft_tokens, 1, _MAX_DRAFT_TOKENS)
        in_range("--drafter-position-offset", self.drafter_position_offset, 0, 1)
        in_range("--workers", self.workers, 1, 64)
        in_range("--batch-size", self.batch_size, 1, _MAX_BATCH_SIZE)
        for option, given in (("--portable", self.portable), ("--batch-size", self.batch_size > 1)):
            if given and self.export_format != "onnx":
                raise UserError(f"{option} is for --target onnx, got --target {self.export_format}")
        if self.delegate != "cpu" and self.export_format != "tflite":
            raise UserError(f"--delegate {self.delegate} is for --target tflite, got --target {self.export_format}")
        if self.composites and self.delegate != "gpu":
            raise UserError(f"--composites is for --delegate gpu, got --delegate {self.delegate}")
        if self.portable and self.batch_size > 1:
            raise UserError("--batch-size needs ONNX Runtime's own attention: leave --portable out")


def one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Check that an option has one of its values.

    Raises:
        UserError: it has not.
    """
    if value not in allowed:
        raise UserError(f"{name} is {value!r}, expected one of: {', '.join(sorted(allowed))}")


def in_range(name: str, value: int, low: int, high: int) -> None:
    """Check that a number lies within low…high.

    Raises:
        UserError: it does not.
    """
    if not low <= value <= high:
        raise UserError(f"{name} is {value}, expected {low} to {high}")
