"""Recipes: named quantisation plans, pure data.

Norms, layer scalars and the drafter's centroids stay float32 in every recipe: they are small, and int8 centroids
change the best cluster (1 argmax of 24 measured).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How a matrix is stored: symmetric, one scale a row, or one a block of `block_size` columns (0: none)."""

    bits: int
    block_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Formats by the use of a matrix.

    linear: projections. head: the tied output matrix of the target, or the drafter's clustered table. embedding and
    per_layer_embedding: the look-up tables in their own files.
    """

    name: str
    linear: WeightFormat
    head: WeightFormat
    embedding: WeightFormat
    per_layer_embedding: WeightFormat


FLOAT32 = WeightFormat(bits=32, block_size=0)
INT8 = WeightFormat(bits=8, block_size=0)
INT4 = WeightFormat(bits=4, block_size=0)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="f32", linear=FLOAT32, head=FLOAT32, embedding=FLOAT32, per_layer_embedding=FLOAT32),
        Recipe(name="int8", linear=INT8, head=INT8, embedding=INT8, per_layer_embedding=INT8),
        # The head decides between near words and the embedding feeds both models: at 8 bits they cost little.
        Recipe(name="int4", linear=INT4, head=INT8, embedding=INT8, per_layer_embedding=INT4),
    )
}

# A wrong draft costs a round, so the drafter keeps 8 bits where the target goes to 4; it is a fiftieth of its size.
DRAFTER_RECIPES = {"f32": "f32", "int8": "int8", "int4": "int8"}
