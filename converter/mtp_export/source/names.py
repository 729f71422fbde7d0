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

_BASE = "model."  # which transformers adds to a name, or takes off, where the class that it loads has the other one
# Where the text model lies, by the class that config.json names: there first, as transformers (5.22) has it, then as
# older versions and other tools do.
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "gemma4": ("model.language_model.", "language_model.model.", "model.", ""),
    "gemma4_text": ("model.", "model.language_model.", "language_model.model.", "language_model."),
}
OLD_LAYOUT = "language_model.model."  # of the class before transformers 4.52: its head lies beside the model
EMBEDDING_MODULE, HEAD_MODULE = "embed_tokens", "lm_head"
_HEAD = f"{HEAD_MODULE}."
_OLD_HEAD = f"language_model.{_HEAD}"
_OF_DRAFTER = (_HEAD, "pre_projection.", "post_projection.", "masked_embedding.")
# What the text model has directly below it; the rest of a name that begins with `model.` may be a tower's.
_OF_TEXT_MODEL = re.compile(
    r"(layers\.\d+|embed_tokens|embed_tokens_per_layer|per_layer_model_projection|per_layer_projection_norm|norm"
    r"|rotary_emb)\."
)
_LAYERS = re.compile(r"layers\.\d+\.")

# Wrappers of training libraries: torch.compile, (Distributed)DataParallel, PEFT, FSDP, activation checkpointing.
OUTER_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_MOST_WRAPPERS = 8  # around one another
# Parts of an adapter that was saved with the model without being merged: transformers would load the model without it.
_UNMERGED = re.compile(r"\.(base_layer|lora_[A-Za-z_]+|modules_to_save|token_adapter)\.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """The names of a file: the stored ones of the model's tensors by canonical name, those of all other tensors, what
    the file puts before the canonical ones, and how many names have which wrapper of a training library."""

    stored: Mapping[str, str]
    others: Sequence[str]
    prefix: str
    wrapped: Mapping[str, int]

    def missing(self, name: str, where: str) -> CheckpointError:
        """Return the error that a tensor is missing, by its canonical name."""
        for wrapper, count in self.wrapped.items():
            return CheckpointError(
                f"{where}: {count} tensors have {wrapper!r} in their names, which a wrapper of a training library put "
                f"there, and {self.prefix}{name} is missing: save the model that is inside the wrapper"
            )
        if not any(_LAYERS.match(stored.removeprefix(_BASE)) for stored in self.stored):
            return CheckpointError(
                f"{where}: no tensor …layers.0.… of a text model: this is not a whole Gemma 4 checkpoint"
            )
        return CheckpointError(f"{where}: tensor {self.prefix}{name} is missing: the checkpoint is incomplete")


def canonical_names(stored: Collection[str], part: str, model_type: object, where: str) -> Names:
    """Find the model's tensors among the stored names.

    Args:
        part: "target" or "drafter".
        model_type: of config.json, which decides what transformers takes the tensors for.
        where: the folder, for errors.

    Raises:
        CheckpointError: one of them is stored twice, or part of an adapter that is not merged.
    """
    bare = _unwrapped(stored, where)
    layouts = ("model.",) if part == "drafter" else LAYOUTS.get(str(model_type), LAYOUTS["gemma4"])
    of_class = {name: _in_class(name, layouts[0], part) for name in bare}
    prefix = next((p for p in layouts if any(_is_layer(name, p) for name in of_class.values())), layouts[0])
    names: dict[str, str] = {}
    for name, original in bare.items():
        ours = _canonical(of_class[name], prefix, part)
        if ours is None:
            continue
        if ours in names:
            raise CheckpointError(
                f"{where}: {names[ours]} and {original} are one tensor, stored twice: remove one of them"
            )
        names[ours] = original
    wrapped = Counter(w for name in bare for w in {*OUTER_WRAPPERS, *INNER_WRAPPERS} if _has_wrapper(name, w))
    others = sorted(set(bare.values()) - set(names.values()))
    shown = "" if part == "drafter" else prefix  # a drafter's canonical names have it already
    return Names(stored=names, others=others, prefix=shown, wrapped=wrapped)


def canonical_module(name: str) -> str:
    """Return the canonical name of a module or parameter of a target, in whichever layout it is written.

    Names of towers, and what is no name of a target, are returned as they are.
    """
    for prefix in sorted({p for prefixes in LAYOUTS.values() for p in prefixes}, key=len, reverse=True):
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and _OF_TEXT_MODEL.match(f"{rest}."):
            return rest
    for head in (_HEAD, _BASE + _HEAD, _OLD_HEAD):
        if f"{name}.".startswith(head):
            return name[len(head) - len(_HEAD) :]
    return name


def _in_class(name: str, prefix: str, part: str) -> str:
    """A stored name as transformers takes it: with its base's prefix added or taken off where the class has that name.

    As in `rename_source_key` (core_model_loading.py), where taking off comes first.
    """
    heads = _OF_DRAFTER if part == "drafter" else (_HEAD,)

    def known(name: str) -> bool:
        return name.startswith(heads) or _of_text_model(name, prefix)

    if name.startswith(_BASE) and known(name.removeprefix(_BASE)):
        return name.removeprefix(_BASE)
    return _BASE + name if not known(name) and known(_BASE + name) else name


def _of_text_model(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and _OF_TEXT_MODEL.match(name.removeprefix(prefix)) is not None


def _is_layer(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and _LAYERS.match(name.removeprefix(prefix)) is not None


def _canonical(name: str, prefix: str, part: str) -> str | None:
    """Return the canonical name of a tensor of the model, None of another; all of a drafter's are its own."""
    if part == "drafter":
        return name
    if _of_text_model(name, prefix):
        return name.removeprefix(prefix)
    if prefix == OLD_LAYOUT and name.startswith(_OLD_HEAD):
        return name.removeprefix("language_model.")
    return name if name.startswith(_HEAD) else None


def _unwrapped(stored: Collection[str], where: str) -> dict[str, str]:
    """Stored names by what they are without the wrappers that every tensor has."""
    names = {name: name for name in stored}
    for _ in range(_MOST_WRAPPERS):
        wrapper = next((w for w in OUTER_WRAPPERS if names and all(name.startswith(w) for name in names)), None)
        if wrapper is None:
            break
        names = {name.removeprefix(wrapper): original for name, original in names.items()}
    for name, original in names.items():
        if unmerged := _UNMERGED.search(f".{name}."):
            raise CheckpointError(
                f"{where}: tensor {original} is part of an adapter that is not merged ({unmerged[1]}): call "
                "merge_and_unload() before saving, or give the base with --checkpoint and the adapter with --adapter"
            )
    return names


def _has_wrapper(name: str, wrapper: str) -> bool:
    return name.startswith(wrapper) or (wrapper in INNER_WRAPPERS and f".{wrapper}" in name)
