"""Recipes: named quantisation plans, pure data.

Norms, layer scalars and the drafter's centroids stay float32 in every recipe: they are small, and int8 centroids
change the best cluster (1 argmax of 24 measured).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

# How a block's scale is found: from its largest value; as the one of a few whose squared error is least; or as
# llama.cpp's q4_0 does it, whose lattice a QAT checkpoint was trained for.
ScaleRule = Literal["max", "fitted", "q4_0"]
_SMALLEST_BLOCK = 32
SMALLEST_SCALE = 2.0**-14  # float16's smallest normal number: runtimes refuse a scale below it


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How a matrix is stored: symmetric, one scale a row, or one a block of `block_size` columns (0: none)."""

    bits: int
    block_size: int
    scale: ScaleRule = "max"

    def for_columns(self, columns: int) -> WeightFormat:
        """This format for a matrix so wide: its blocks halved until they divide the columns, or whole rows if none
        does."""
        size = self.block_size
        while size >= _SMALLEST_BLOCK and columns % size:
            size //= 2
        return dataclasses.replace(self, block_size=size if size >= _SMALLEST_BLOCK else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Formats by the use of a matrix.

    linear: projections, but for those whose names are in `linear_int8`. head: the tied output matrix of the target, or
    the drafter's clustered table. embedding and per_layer_embedding: the look-up tables in their own files.
    """

    name: str
    linear: WeightFormat
    head: WeightFormat
    embedding: WeightFormat
    per_layer_embedding: WeightFormat
    linear_int8: tuple[str, ...] = ()


FLOAT32 = WeightFormat(bits=32, block_size=0)
INT8 = WeightFormat(bits=8, block_size=0)
INT4 = WeightFormat(bits=4, block_size=0)
INT4_BLOCKS = WeightFormat(bits=4, block_size=32)
Q4_0 = WeightFormat(bits=4, block_size=32, scale="q4_0")
# The widest blocks that LiteRT multiplies: their scales take less than those of rows, which every signature repeats.
_INT4_FITTED = WeightFormat(bits=4, block_size=256, scale="fitted")
_INT2 = WeightFormat(bits=2, block_size=0, scale="fitted")
_INT2_BLOCKS = WeightFormat(bits=2, block_size=256, scale="fitted")

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="f32", linear=FLOAT32, head=FLOAT32, embedding=FLOAT32, per_layer_embedding=FLOAT32),
        Recipe(name="int8", linear=INT8, head=INT8, embedding=INT8, per_layer_embedding=INT8),
        # The head decides between near words and the embedding feeds both models: at 8 bits they cost little.
        Recipe(name="int4", linear=INT4, head=INT8, embedding=INT8, per_layer_embedding=INT4),
        Recipe(name="int4-block", linear=INT4_BLOCKS, head=INT8, embedding=INT8, per_layer_embedding=INT4_BLOCKS),
        # For phones, the smallest, and with 8 bits where 4 cost most; docs/decisions/0007 has what each choice costs.
        Recipe(
            name="mobile", linear=_INT4_FITTED, head=_INT4_FITTED, embedding=_INT4_FITTED, per_layer_embedding=_INT2
        ),
        Recipe(
            name="mobile-plus",
            linear=_INT4_FITTED,
            head=INT8,
            embedding=_INT4_FITTED,
            per_layer_embedding=_INT2_BLOCKS,
            linear_int8=("k_proj", "v_proj", "o_proj", "per_layer_projection", "per_layer_model_projection"),
        ),
        # For QAT checkpoints: weights that lie on this lattice are stored as they are.
        Recipe(name="q4_0", linear=Q4_0, head=Q4_0, embedding=Q4_0, per_layer_embedding=Q4_0),
    )
}

# A wrong draft costs a round, so the drafter keeps 8 bits where the target goes to 4; it is a fiftieth of its size.
DRAFTER_RECIPES = {name: "f32" if name == "f32" else "int8" for name in RECIPES}


def with_embedders(recipe: Recipe, embedders: Recipe) -> Recipe:
    """`recipe` with the look-up tables of another."""
    return dataclasses.replace(recipe, embedding=embedders.embedding, per_layer_embedding=embedders.per_layer_embedding)
