"""What a checkpoint holds that is not exported, because it changes nothing of what is: listed once, so that a user sees
it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from mtp_export.arch.config_keys import unknown_keys
from mtp_export.arch.json_object import shortened
from mtp_export.source.checkpoint import HEAD, Checkpoint
from mtp_export.source.stored_integers import KEY

# Groups of tensors by a pattern of their names: canonical ones of the text model, stored ones of others.
GROUPS: Mapping[str, str] = {
    "vision tower": r"(model\.)?vision_tower\..*",
    "audio tower": r"(model\.)?audio_tower\..*",
    "projections of images and audio": r"(model\.)?(embed_vision|embed_audio|multi_modal_projector)\..*",
    "keys and values of KV-sharing layers": r"layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\..*",
    "buffers that follow from config.json": r"(.*\.)?(rotary_emb\..*|inv_freq|embed_scale)",
    "scales of a quantised KV cache": r".*\.self_attn\.[kv]_(cache_)?scale",
    "scales of activations": r".*\.(in|out)put_(activation_)?scale",
}
_MOST_NAMES = 3  # of tensors that are in no group


def left_aside(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], *, reads_weights: bool = True
) -> tuple[str, ...]:
    """Return what is left aside of a checkpoint's tensors and config where `expected` is exported, name → shape.

    Args:
        reads_weights: whether head and embedding may be compared, where both are stored.
    """
    keys = [f"`{_printable(key)}`" for key in unknown_keys(checkpoint.config) if key.rpartition(".")[2] != KEY]
    tensors = [*_tensors(checkpoint, expected), *_head(checkpoint, reads_weights)]
    return (*tensors, *_quantization(checkpoint), *_few(keys, "keys of config.json"))


def _printable(name: str) -> str:
    """Return a name out of a file, which may be of any length and hold anything."""
    return shortened(name)[1:-1]


def _head(checkpoint: Checkpoint, reads_weights: bool) -> Iterable[str]:
    if len(checkpoint.tables) == 1 or not checkpoint.ties:
        return []
    if not reads_weights:
        return [f"{HEAD}, if it equals the embedding"]
    return [f"{HEAD}, which equals the embedding"] if checkpoint.tied else []


def _tensors(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
    used = {*expected, *checkpoint.tables}
    for name, shape in expected.items():
        matrix = checkpoint.quantised(name, shape)
        if matrix is not None:
            used |= matrix.tensors
    unused = {name: info.stored for name, info in checkpoint.tensors.items() if name not in used}
    unused |= {name: name for name in checkpoint.names.others}
    counts: Counter[str] = Counter()
    names = []
    for name, stored in unused.items():
        group = next((group for group, pattern in GROUPS.items() if re.fullmatch(pattern, name)), None)
        if group is None:
            names.append(_printable(stored))
        else:
            counts[group] += 1
    groups = [f"{group} ({n} {'tensor' if n == 1 else 'tensors'})" for group in GROUPS if (n := counts[group])]
    return [*groups, *_few(sorted(names), "tensors")]


def _quantization(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield a quantization_config beside weights in floats, which tools leave behind."""
    config = checkpoint.config
    text = config.get("text_config")
    stated = config.get(KEY) or (text.get(KEY) if isinstance(text, dict) else None)
    if not stated or checkpoint.formats:
        return []
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    return [f"`{KEY}` ({_printable(str(method))}): the weights are floats"]


def _few(names: list[str], kind: str) -> list[str]:
    more = len(names) - _MOST_NAMES
    return names if more <= 1 else [*names[:_MOST_NAMES], f"{more} more {kind}"]
