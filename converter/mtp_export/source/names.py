"""Names of tensors: what a parameter of ours is called in a file.

Canonical are those of the text model as transformers' Gemma4TextModel has them (`layers.0.…`, `embed_tokens.…`), and
`lm_head.…`. A drafter's are those of transformers' Gemma4AssistantForCausalLM.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from mtp_export.errors import CheckpointError

# Where the text model lies in a file, by the class that config.json names, in the order in which they are looked for.
# transformers (5.22) loads the first two of each; the others are older files, or tools' own.
PREFIXES: Mapping[str, tuple[str, ...]] = {
    "gemma4": ("model.language_model.", "language_model.", "language_model.model.", "model.", ""),
    "gemma4_text": ("model.", "", "model.language_model.", "language_model.model.", "language_model."),
}
# What the text model has directly below it; the rest of a name that begins with `model.` may be a tower's.
_OF_TEXT_MODEL = re.compile(
    r"(layers\.\d+|embed_tokens|embed_tokens_per_layer|per_layer_model_projection|per_layer_projection_norm|norm"
    r"|rotary_emb)\."
)
_HEAD = "lm_head."
_HEAD_PREFIXES = ("", "model.")  # transformers takes its own prefix off
_OLD_PREFIX = "language_model.model."  # files of this layout have the head beside the model
_OLD_HEAD = "language_model."

# Wrappers of training libraries: torch.compile, (Distributed)DataParallel, PEFT, FSDP, activation checkpointing.
OUTER_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Parts of an adapter that was saved with the model without being merged: transformers would load the model without it.
_UNMERGED = re.compile(r"\.(base_layer|lora_[A-Za-z_]+|modules_to_save|token_adapter)\.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """The names of a file: the stored ones of the model's tensors by canonical name, those of all other tensors, and
    what the file puts before the canonical ones."""

    stored: Mapping[str, str]
    others: Sequence[str]
    prefix: str


def canonical_names(stored: Collection[str], part: str, model_type: object, where: str) -> Names:
    """Find the text model's tensors and its head among the stored names. All of a drafter's are its own.

    Args:
        part: "target" or "drafter".
        model_type: of config.json, which decides what transformers takes the tensors for.
        where: the folder, for errors.

    Raises:
        CheckpointError: there is no text model, it lies there twice, or the names have wrappers that are not taken off.
    """
    bare = _unwrapped(stored, where)
    if part == "drafter":
        return Names(stored=bare, others=(), prefix="")
    prefix = _text_prefix(bare, str(model_type), where)
    names: dict[str, str] = {}
    for name, original in bare.items():
        ours = _canonical(name, prefix)
        if ours in names:
            raise CheckpointError(
                f"{where}: {original} and {names[ours]} are one tensor stored twice: remove one of them"
            )
        if ours is not None:
            names[ours] = original
    return Names(stored=names, others=sorted(set(bare.values()) - set(names.values())), prefix=prefix)


def canonical_module(name: str) -> str:
    """Return the canonical name of a module or parameter of a target, in whichever layout it is written.

    Names of towers, and what is no name of a target, are returned as they are.
    """
    for prefix in sorted({p for prefixes in PREFIXES.values() for p in prefixes}, key=len, reverse=True):
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and _OF_TEXT_MODEL.match(f"{rest}."):
            return rest
    for prefix in (*_HEAD_PREFIXES, _OLD_HEAD):
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and f"{rest}.".startswith(_HEAD):
            return rest
    return name


def _canonical(name: str, prefix: str) -> str | None:
    """The canonical name of a tensor of the text model or its head, None of another."""
    if name.startswith(prefix) and _OF_TEXT_MODEL.match(rest := name.removeprefix(prefix)):
        return rest
    for head_prefix in (*_HEAD_PREFIXES, *([_OLD_HEAD] if prefix == _OLD_PREFIX else [])):
        if name.startswith(head_prefix + _HEAD):
            return name.removeprefix(head_prefix)
    return None


def _unwrapped(stored: Collection[str], where: str) -> dict[str, str]:
    """Stored names by what they are without the wrappers that every tensor has."""
    names = {name: name for name in stored}
    while wrapper := next((w for w in OUTER_WRAPPERS if names and all(name.startswith(w) for name in names)), None):
        names = {name.removeprefix(wrapper): original for name, original in names.items()}
    for name, original in names.items():
        if unmerged := _UNMERGED.search(f".{name}."):
            raise CheckpointError(
                f"{where}: tensor {original} is part of an adapter that is not merged ({unmerged[1]}): call "
                "merge_and_unload() before saving, or give the base with --checkpoint and the adapter with --adapter"
            )
    wrapped = Counter(w for name in names for w in {*OUTER_WRAPPERS, *INNER_WRAPPERS} if _has_wrapper(name, w))
    for wrapper, count in wrapped.items():
        raise CheckpointError(
            f"{where}: {count} of {len(names)} tensors have {wrapper!r} in their names, which a wrapper of a training "
            "library put there: save the model that is inside it"
        )
    return names


def _has_wrapper(name: str, wrapper: str) -> bool:
    return name.startswith(wrapper) or (wrapper in INNER_WRAPPERS and f".{wrapper}" in name)


def _text_prefix(names: Collection[str], model_type: str, where: str) -> str:
    """The prefix of the text model's tensors: the one of the class that config.json names, if it is there."""
    prefixes: Sequence[str] = PREFIXES.get(model_type, PREFIXES["gemma4"])
    found = [p for p in prefixes if any(n.startswith(p) and _OF_TEXT_MODEL.match(n.removeprefix(p)) for n in names)]
    if not found:
        raise CheckpointError(f"{where}: no tensor …layers.0.… of a text model: this is not a Gemma 4 checkpoint")
    loaded = [p for p in found if p in prefixes[:2]]
    if len(loaded) > 1:
        raise CheckpointError(
            f"{where}: the text model is stored twice, as {loaded[0] or 'layers.'}… and as {loaded[1] or 'layers.'}…: "
            "remove one of them"
        )
    return found[0]
