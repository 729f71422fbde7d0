"""Heads and embeddings: tied, trained apart, stored once or twice."""

from __future__ import annotations

from tests.differential.oracle import (
    Pair,
)
from tests.differential.tensor_layouts import (
    DRAFTER_EMBEDDING,
    EMBEDDING,
    HEAD,
    SUITE,
    layout_of_older_transformers,
    noise,
)

equal, refused = SUITE.equal, SUITE.refused
HEAD_EQUAL = "lm_head.weight, which equals the embedding"


@equal(HEAD_EQUAL)
def tied_head_stored_too(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored[EMBEDDING]}))


@equal(HEAD_EQUAL)
def tied_head_stored_in_another_dtype(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored[EMBEDDING].float()}))


@equal()
def head_trained_apart_under_a_config_that_says_tied(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: noise(stored[EMBEDDING])}))


@equal()
def head_trained_apart_under_a_config_that_says_so(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: noise(stored[EMBEDDING])}))
    pair.config({"tie_word_embeddings": False})


@equal()
def head_equal_under_a_config_that_says_untied(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored[EMBEDDING]}))
    pair.config({"tie_word_embeddings": False})
    pair.text_config(tie_word_embeddings=False)


@equal()
def head_within_the_base_model_prefix(pair: Pair) -> None:
    """transformers takes its own prefix off."""
    pair.tensors(lambda stored: stored.update({f"model.{HEAD}": noise(stored[EMBEDDING])}))


@equal()
def head_alone_stored(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored.pop(EMBEDDING)}))


@equal()
def untied_in_the_text_config_alone(pair: Pair) -> None:
    """Of the whole model, the outer config counts."""
    pair.text_config(tie_word_embeddings=False)


@equal()
def tied_in_the_text_config_alone(pair: Pair) -> None:
    pair.config({"tie_word_embeddings": ...})


@equal("language_model.lm_head.weight")
def head_under_a_name_that_transformers_does_not_know(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({f"language_model.{HEAD}": noise(stored[EMBEDDING])}))


@equal(loads=False)
def untied_head_in_the_layout_of_older_transformers(pair: Pair) -> None:
    """The head beside the model belongs to it there; this one equals the embedding."""
    layout_of_older_transformers(pair)
    name = "language_model.model.embed_tokens.weight"
    pair.tensors(lambda stored: stored.update({f"language_model.{HEAD}": stored[name]}))
    pair.config({"tie_word_embeddings": False})


@refused(
    "config.json says tie_word_embeddings = false, and tensor lm_head.weight is missing: the checkpoint is incomplete, "
    "or set tie_word_embeddings to true if its head is its embedding",
    remedy=lambda pair: pair.config({"tie_word_embeddings": True}),
)
def untied_without_a_head(pair: Pair) -> None:
    pair.config({"tie_word_embeddings": False})


@refused("tensor model.language_model.embed_tokens.weight is missing: the checkpoint is incomplete")
def neither_head_nor_embedding(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.pop(EMBEDDING))


@refused("tensor lm_head.weight has shape [4000, 256], config.json asks for [4096, 256]")
def head_cut_short(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored[EMBEDDING][:4000]}))


@equal("of the drafter: lm_head.weight, which equals the embedding")
def drafter_with_its_tied_head(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored[DRAFTER_EMBEDDING]}), "drafter")


@equal()
def drafter_with_a_head_trained_apart(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: noise(stored[DRAFTER_EMBEDDING])}), "drafter")


@equal()
def drafter_with_its_head_alone(pair: Pair) -> None:
    pair.tensors(lambda stored: stored.update({HEAD: stored.pop(DRAFTER_EMBEDDING)}), "drafter")
