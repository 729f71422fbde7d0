"""python -m tests.differential > docs/checkpoints.md

What is read of a checkpoint, left aside and refused: made from the tables that the code goes by, and from the
transformations of this suite.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from mtp_export.arch.config_keys import BOOKKEEPING, DRAFTER_DEFAULTS, ONE_VALUE, OTHER_MODELS, TEXT_DEFAULTS
from mtp_export.source import generation, left_aside
from mtp_export.source.adapters import fields as adapter_fields
from mtp_export.source.checkpoint import FLOATS, TEXT_FILES
from mtp_export.source.names import INNER_WRAPPERS, LAYOUTS, OUTER_WRAPPERS
from tests.differential import (
    test_files,
    test_leftovers,
    test_templates,
    test_tensors,
    test_texts,
    test_texts_refused,
)
from tests.differential.text_folders import TextSuite
from tests.differential.transformation import Suite

SUITES: Mapping[str, Suite | TextSuite] = {
    "Tensors": test_tensors.SUITE,
    "Files": test_files.SUITE,
    "config.json": test_leftovers.SUITE,
    "Tokenizer and special tokens": test_texts.SUITE,
    "Chat template": test_templates.SUITE,
    "Texts that are refused": test_texts_refused.SUITE,
}


OF_WHOLE = {"text_config", "transformers_weights"}  # keys that are read beside those of the text model


def page() -> str:
    """Return the page."""
    return "\n".join([*_head(), *_config(), *_tensors(), *_adapters(), *_generation(), *_suites()]) + "\n"


def _head() -> list[str]:
    return [
        "# Checkpoints: what is read, left aside and refused",
        "",
        "transformers says what a checkpoint means: a folder that it loads as Gemma 4 E2B or E4B, without a missing "
        "tensor, is exported to the same model, or refused in one line that names the reason. What changes nothing of "
        "what is exported never stops an export: it is left aside, and `plan` and `export` list it once.",
        "",
        "This page is made by `python -m tests.differential`, from the tables that the code goes by and from the "
        "transformations of `tests/differential`; a test compares it.",
    ]


def _config() -> list[str]:
    expected = {
        f"`{key}` = {value!r}": f"no export of {feature.rstrip(',')}" for key, (value, feature) in ONE_VALUE.items()
    }
    plain = sorted(TEXT_DEFAULTS.keys() - ONE_VALUE.keys())
    return [
        "",
        "## config.json",
        "",
        "A key is one of three. A null is as good as a key that is left out, and has transformers' default; it has a "
        "meaning of its own in `is_causal`, where it is refused, and in `per_layer_config`.",
        "",
        f"**Read**, of the text model: {_code(plain)}; of a drafter also {_code(sorted(DRAFTER_DEFAULTS))}.",
        "",
        "**Read, with one value that is exported:**",
        "",
        *_table("key", "another value is refused", expected),
        "",
        "Of the whole config are read `model_type`, `text_config`, `tie_word_embeddings`, the ids of special tokens, "
        "and `transformers_weights`, the file that holds the weights.",
        "",
        f"**Bookkeeping**, ignored: {_code(sorted(BOOKKEEPING - TEXT_DEFAULTS.keys() - OF_WHOLE))}.",
        "",
        "**Any other key** is left aside and listed, `quantization_config` beside weights in floats too: the dtype of "
        "the tensors decides how they are stored.",
        "",
        "Models of other sizes and families are refused by name: " + _code(sorted(OTHER_MODELS)) + ".",
    ]


def _tensors() -> list[str]:
    prefixes = {f"`{kind}`": _code(p or "(none)" for p in layouts) for kind, layouts in LAYOUTS.items()}
    return [
        "",
        "## Tensors",
        "",
        f"Floats are {', '.join(FLOATS)}; integers as compressed-tensors stores them "
        "(docs/decisions/0008-stored-integers.md). The text model is looked for under these prefixes, in their order:",
        "",
        *_table("model_type", "prefixes", prefixes),
        "",
        f"Wrappers of training libraries are taken off where every tensor has them: {_code(OUTER_WRAPPERS)}. Elsewhere "
        f"they, and {_code(INNER_WRAPPERS)} within names, are told where a tensor is missing for them. Parts of an "
        "adapter that is not merged are refused.",
        "",
        "A head of its own is read, for target and drafter. As in transformers, head and embedding are one where the "
        "config ties them, unless both are stored and differ; where one of them is stored, it is both.",
        "",
        "Left aside, and counted:",
        "",
        *_table("what", "names", {group: f"`{pattern}`" for group, pattern in left_aside.GROUPS.items()}),
        "",
        "Any other tensor that the model does not have is left aside by its name.",
        "",
        "Of a folder, model.safetensors is read, or without it what its index names, or without one a full set of "
        f"numbered shards; and {_code(TEXT_FILES)}.",
    ]


def _adapters() -> list[str]:
    refused = {f"`{key}`": reason for key, (_, reason) in adapter_fields.PLAIN.items()}
    return [
        "",
        "## Adapters",
        "",
        "What PEFT's `merge_and_unload` gives is exported. Of adapter_config.json",
        "",
        f"* read: {_code(adapter_fields.READ)};",
        f"* harmless: {_code(adapter_fields.HARMLESS)};",
        "* unknown to PEFT: left aside and listed.",
        "",
        "Refused where they are set:",
        "",
        *_table("setting", "why, or what to do", refused),
        "",
        f"Refused by name are also `init_lora_weights` that begin with {_code(adapter_fields.CHANGED_STARTS)}, which "
        "changed the model's own weights, any that is not known to leave them alone, and kinds other than LoRA.",
    ]


def _generation() -> list[str]:
    return [
        "",
        "## Generation",
        "",
        f"Of generation_config.json (without it, of config.json) are obeyed: {_code(generation.OBEYED)}.",
        "",
        f"Left aside and listed where they say something: {_code(sorted(generation.NOT_OBEYED))}, and keys that "
        "transformers does not know.",
    ]


def _suites() -> list[str]:
    lines = ["", "## What the suite does to folders"]
    for title, suite in SUITES.items():
        equal = [name for name, case in suite.cases.items() if not case.refused]
        refused = {_words(name): f"… {case.words[0]} …" for name, case in suite.cases.items() if case.refused}
        lines += ["", f"### {title}"]
        lines += ["", f"Exported to the same model: {', '.join(map(_words, equal))}."] if equal else []
        lines += ["", *_table("refused", "with these words", refused)] if refused else []
    return lines


def _words(name: str) -> str:
    return name.replace("_", " ")


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(first: str, second: str, rows: Mapping[str, str]) -> list[str]:
    cells = [f"| {key} | {value} |".replace("\n", " ") for key, value in rows.items()]
    return [f"| {first} | {second} |", "|---|---|", *(cell.replace(r"\|", "|") for cell in cells)]


if __name__ == "__main__":
    sys.stdout.write(page())
