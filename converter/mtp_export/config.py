"""What a user requests of an export: a part for each question. Each checks itself before a checkpoint is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from mtp_export.arch.published import PAIRS
from mtp_export.weights.recipes import DRAFTER_RECIPES, RECIPES
from mtp_runtime.errors import UserError

EXPORT_FORMATS = ("tflite", "onnx")
DELEGATES = ("cpu", "gpu")
ROUNDINGS = ("nearest", "gptq")
_MAX_DRAFT_TOKENS = 16
_MAX_BATCH_SIZE = 8
MIN_CACHE_LENGTH = 32
_MAX_CACHE_LENGTH = 1 << 20  # a checkpoint says how far positions really go


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which pair. `target` and `drafter` are local folders or Hugging Face ids, None for the model's own.
    `chat_template` is a file in place of the target's own template."""

    model: str
    target: str | None = None
    drafter: str | None = None
    adapters: tuple[Path, ...] = ()
    chat_template: Path | None = None

    def check(self) -> None:
        one_of("--model", self.model, PAIRS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatConfig:
    """Which export format, and its variants. delegate: gpu keeps to operations that a GPU takes, and to one buffer of
    each cache there. composites: norms as operators of LiteRT-LM's GPU backend. portable: ONNX in standard operations
    alone. batch_size: ONNX graphs for so many sequences in one pass, beside those for one."""

    name: str = "tflite"
    delegate: str = "cpu"
    composites: bool = False
    portable: bool = False
    batch_size: int = 1

    @property
    def chooses_context(self) -> bool:
        """Whether the context of a bundle is chosen when it is loaded."""
        return self.name == "tflite" and self.delegate == "cpu"

    def check(self) -> None:
        one_of("--format", self.name, EXPORT_FORMATS)
        one_of("--delegate", self.delegate, DELEGATES)
        in_range("--batch-size", self.batch_size, 1, _MAX_BATCH_SIZE)
        for option, is_set in (("--portable", self.portable), ("--batch-size", self.batch_size > 1)):
            if is_set and self.name != "onnx":
                raise UserError(f"{option} is for --format onnx, got --format {self.name}")
        if self.delegate != "cpu" and self.name != "tflite":
            raise UserError(f"--delegate {self.delegate} is for --format tflite, got --format {self.name}")
        if self.composites and self.delegate != "gpu":
            raise UserError(f"--composites is for --delegate gpu, got --delegate {self.delegate}")
        if self.portable and self.batch_size > 1:
            raise UserError("--batch-size needs ONNX Runtime's own attention: leave --portable out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisationConfig:
    """Names of recipes: of the target, of the drafter, and of the look-up tables of token embeddings."""

    recipe: str = "int8"
    drafter_recipe: str | None = None
    embedder_recipe: str | None = None

    @property
    def drafter(self) -> str:
        """The drafter's recipe, by default the one that belongs to the target's."""
        return self.drafter_recipe or DRAFTER_RECIPES[self.recipe]

    @property
    def embedders(self) -> str:
        """The recipe of the look-up tables, by default the target's."""
        return self.embedder_recipe or self.recipe

    def check(self) -> None:
        one_of("--recipe", self.recipe, RECIPES)
        for option, recipe in (("drafter", self.drafter_recipe), ("embedder", self.embedder_recipe)):
            if recipe is not None:
                one_of(f"--{option}-recipe", recipe, RECIPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """Sizes of graphs and settings of the drafter; None stands for the model's default. cache_length: the longest
    context. context_length: that of an application that chooses none. ring_length: slots of the caches of sliding
    layers, 0 for as many as all others have. drafter_position_offset: 1 for transformers' position convention, 0 for
    vLLM's; it changes acceptance only. centroid_top_k: clusters that the head scores."""

    cache_length: int | None = None
    context_length: int | None = None
    ring_length: int | None = None
    num_draft_tokens: int | None = None
    drafter_position_offset: int = 1
    centroid_top_k: int | None = None

    def check(self) -> None:
        if self.cache_length is not None:
            in_range("--cache-length", self.cache_length, MIN_CACHE_LENGTH, _MAX_CACHE_LENGTH)
        if self.context_length is not None:
            in_range("--default-context", self.context_length, MIN_CACHE_LENGTH, _MAX_CACHE_LENGTH)
        if self.num_draft_tokens is not None:
            in_range("--num-draft-tokens", self.num_draft_tokens, 1, _MAX_DRAFT_TOKENS)
        in_range("--drafter-position-offset", self.drafter_position_offset, 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinementConfig:
    """What is settled by measuring the pair, all of it on `prompts` (None: those of the package).

    measured: which of GraphConfig's drafter_position_offset and centroid_top_k become what is best. rounding: of the
    target's matrices, to the nearest value or by GPTQ. max_size_bytes: of what ships; fewer bits than the recipe's
    where they cost least. gate: keep the bundle only if it is measured to be the same model still.
    """

    prompts: Path | None = None
    measured: tuple[str, ...] = ()
    rounding: str = "nearest"
    max_size_bytes: int | None = None
    gate: bool = False

    @property
    def needs_prompts(self) -> bool:
        return bool(self.measured) or self.rounding == "gptq" or self.max_size_bytes is not None

    def check(self) -> None:
        one_of("--rounding", self.rounding, ROUNDINGS)
        if self.prompts is not None and not self.needs_prompts:
            raise UserError("--prompts is for --rounding gptq, --max-size and what is auto, got none of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """An export: its parts, the folder to write, and how many processes convert."""

    source: SourceConfig
    output: Path
    format: FormatConfig = FormatConfig()
    quantisation: QuantisationConfig = QuantisationConfig()
    graph: GraphConfig = GraphConfig()
    refinement: RefinementConfig = RefinementConfig()
    force: bool = False
    workers: int = 1

    def check(self) -> None:
        """Check all that can be checked before a checkpoint is opened.

        Raises:
            UserError: an option has no value of its kind, with the ones that it may have.
        """
        for part in (self.source, self.format, self.quantisation, self.graph, self.refinement):
            part.check()
        in_range("--workers", self.workers, 1, 64)
        for option, value in (("default-context", self.graph.context_length), ("rings", self.graph.ring_length)):
            if value is not None and not self.format.chooses_context:
                raise UserError(
                    f"--{option} is for --format tflite --delegate cpu, whose context an app chooses: leave it out"
                )
        recipe = self.quantisation.recipe
        if self.refinement.rounding == "gptq" and recipe in ("f32", "q4_0"):
            why = "nothing is rounded" if recipe == "f32" else "its weights must stay on their lattice"
            raise UserError(f"--rounding gptq with --recipe {recipe}: {why}: leave one of them out")


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
