"""Which modules of the text model an adapter changes, as PEFT decides it by their names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtp_export.errors import CheckpointError
from mtp_export.source.adapters.config import AdapterConfig
from mtp_export.source.adapters.patterns import Patterns
from mtp_export.source.checkpoint import FLOATS, Checkpoint
from mtp_export.source.names import EMBEDDING_MODULE, HEAD_MODULE

EMBEDDING, HEAD = EMBEDDING_MODULE, HEAD_MODULE
EMBEDDINGS = (EMBEDDING, "embed_tokens_per_layer")  # modules that are looked up in
MULTIMODAL = "model.language_model."
_TIED = (EMBEDDING, HEAD)
_NO_LAYER = 1 << 31
_ALL_LINEAR = "all-linear"
NO_PAIRS = "dummy-target-modules"  # what PEFT writes where only whole modules are trained
_BY_DEFAULT = r".*language_model\..*\.(q_proj|v_proj)"  # PEFT's choice for the architecture gemma4
_KEYS_AND_VALUES = re.compile(r"layers\.(\d{1,9})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)")
_INTEGER_PARTS = re.compile(r"(.+)\.weight_(packed|scale|shape)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextModel:
    """The text model as transformers builds it.

    shapes: of its parameters, by canonical name. Keys and values of layers that share another layer's are not there.
    integers: modules that the checkpoint stores as integers.
    unused_from: the first layer that has no keys and values of its own.
    """

    shapes: Mapping[str, tuple[int, ...]]
    integers: frozenset[str]
    unused_from: int

    def lacks(self, module: str) -> bool:
        """Return whether a module is of keys or values that a layer takes from another one."""
        return _is_unused(module, self.unused_from)

    def matrices(self) -> list[str]:
        """Modules that pairs can change, in an order in which the embedding comes first and the head last."""
        modules = [n.removesuffix(".weight") for n, shape in self.shapes.items() if len(shape) == 2]
        return sorted(modules, key=lambda module: (module == HEAD, module != EMBEDDING, module))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """What an adapter changes.

    pairs: modules with a low-rank pair, in the order of merging.
    saved: parameters that the adapter brings whole, into copies of their modules.
    ties_pairs, ties_saved: the embedding's are the head's too.
    """

    pairs: tuple[str, ...]
    saved: frozenset[str]
    ties_pairs: bool
    ties_saved: bool


def read_text_model(checkpoint: Checkpoint) -> TextModel:
    """Return the text model of a target's checkpoint."""
    unused_from = _unused_from(checkpoint.config)
    shapes: dict[str, tuple[int, ...]] = {}
    integers: set[str] = set()
    for name, info in checkpoint.tensors.items():
        part = _INTEGER_PARTS.fullmatch(name)
        module = part[1] if part else name.rpartition(".")[0]
        if part or info.dtype not in FLOATS:
            integers.add(module)
            name = f"{module}.weight"
        if not _is_unused(module, unused_from):
            shapes.setdefault(name, info.shape)
    tables = [f"{module}.weight" for module in _TIED]
    stored = next((shapes[name] for name in tables if name in shapes), None)
    if stored is not None:
        shapes |= {name: shapes.get(name, stored) for name in tables}
    if not integers.isdisjoint(_TIED):
        integers |= set(_TIED)
    return TextModel(shapes=shapes, integers=frozenset(integers), unused_from=unused_from)


def _unused_from(config: Any) -> int:
    """Return the first layer without keys and values of its own; a config that does not say it is refused elsewhere."""
    whole = config if isinstance(config, dict) else {}
    text = whole["text_config"] if isinstance(whole.get("text_config"), dict) else whole
    layers, shared = text.get("num_hidden_layers"), text.get("num_kv_shared_layers")
    return layers - shared if isinstance(layers, int) and isinstance(shared, int) else _NO_LAYER


def _is_unused(module: str, unused_from: int) -> bool:
    match = _KEYS_AND_VALUES.fullmatch(module)
    return match is not None and int(match[1]) >= unused_from


def spelled(module: str, prefix: str) -> str:
    """Return the name that PEFT matches: that of the module in the class that the adapter was trained on."""
    return module if module == HEAD else prefix + module


def select(model: TextModel, config: AdapterConfig, patterns: Patterns, prefix: str, *, tied: bool) -> Selection:
    """Return what PEFT would change.

    Args:
        prefix: of the text model in the class that the adapter was trained on.
        tied: whether the model's config ties head and embedding.

    Raises:
        CheckpointError: a pattern is none, or takes too long; or what is saved lies in another that is.
    """
    to_save = list(config.modules_to_save)
    ties = tied and config.ties
    ties_saved = ties and any(name.rpartition(".")[2] in _TIED for name in to_save)
    if ties_saved:
        to_save.append(prefix + EMBEDDING)
        is_head = [_matches_dotted(patterns, name)(HEAD) for name in to_save]
        to_save = [name for name, head in zip(to_save, is_head, strict=True) if not head]
    ties_pairs = ties and not ties_saved and _targets_tied(config, patterns)
    excluded = [_matches_dotted(patterns, name) for name in to_save]
    targeted = _targeted(model, config, patterns, prefix)
    pairs = [
        module
        for module in model.matrices()
        if not any(match(spelled(module, prefix)) for match in excluded)
        and (targeted(module) or (ties_pairs and module in _TIED))
    ]
    saved = _saved(model, to_save, prefix, config.where)
    if ties_saved:
        saved |= {f"{HEAD}.weight"}
    return Selection(pairs=tuple(pairs), saved=frozenset(saved), ties_pairs=ties_pairs, ties_saved=ties_saved)


def _saved(model: TextModel, to_save: Sequence[str], prefix: str, where: str) -> set[str]:
    """Return parameters below the modules whose names end as one of `to_save`, dots or not."""
    saved = set()
    for name in model.shapes:
        parts = spelled(name.rpartition(".")[0], prefix).split(".")
        modules = [".".join(parts[: n + 1]) for n in range(len(parts))]
        copied = [module for module in modules if any(module.endswith(end) for end in to_save)]
        if len(copied) > 1:
            raise CheckpointError(
                f"{where}: modules_to_save names {copied[0]} and {copied[1]} inside it, which PEFT does not merge "
                "as it trained them: train one of them"
            )
        if copied:
            saved.add(name)
    return saved


def _matches_dotted(patterns: Patterns, name: str) -> Callable[[str], bool]:
    return patterns.compiled("modules_to_save", rf"(^|.*\.){name}($|\..*)", whole=False)


def _targets_tied(config: AdapterConfig, patterns: Patterns) -> bool:
    modules = config.targets.modules
    if isinstance(modules, str):
        matches = patterns.compiled("target_modules", modules, whole=True)
        return any(matches(module) for module in _TIED)
    return any(name.rpartition(".")[2] in _TIED for name in modules or ())


def _targeted(model: TextModel, config: AdapterConfig, patterns: Patterns, prefix: str) -> Callable[[str], bool]:
    """Return whether the config names a module."""
    targets = config.targets
    named = _named(config, patterns)
    if isinstance(targets.excluded, str):
        left_out = patterns.compiled("exclude_modules", targets.excluded, whole=True)
    else:
        left_out = _ends(targets.excluded)

    def targeted(module: str) -> bool:
        name = spelled(module, prefix)
        if left_out(name):
            return False
        if isinstance(targets.modules, str) and targets.modules.lower() == _ALL_LINEAR:
            return module not in (*EMBEDDINGS, HEAD)
        return named(name)

    return targeted


def _named(config: AdapterConfig, patterns: Patterns) -> Callable[[str], bool]:
    """Return whether target_modules, with layers_to_transform, names a module by its spelled name."""
    targets = config.targets
    modules = _BY_DEFAULT if targets.modules is None else targets.modules
    if isinstance(modules, str):
        return patterns.compiled("target_modules", modules, whole=True)
    ends, in_layers = _ends(modules), _in_layers(config, patterns)
    return lambda name: name in modules or (ends(name) and in_layers(name))


def _ends(ends: tuple[str, ...]) -> Callable[[str], bool]:
    whole, dotted = frozenset(ends), tuple(f".{end}" for end in ends)
    return lambda name: name in whole or name.endswith(dotted)


def _in_layers(config: AdapterConfig, patterns: Patterns) -> Callable[[str], bool]:
    """Whether a module is in a layer that layers_to_transform has: its number is the first one after a name, or after
    one of layers_pattern."""
    layers, names = config.targets.layers, config.targets.layers_patterns
    if layers is None:
        return lambda name: True
    expressions = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in names] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    numbers = [patterns.numbered("layers_pattern", expression) for expression in expressions]

    def in_layers(name: str) -> bool:
        number = next((n for number_of in numbers if (n := number_of(name)) is not None), None)
        return number is not None and number in layers

    return in_layers
