"""transformers' models of a pair, to be trained or listened to: loading, merged adapters, writing as it was stored."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.names import canonical_module
from mtp_export.source.pair import Pair

_ROWS_AT_ONCE = 8192


def load(folder: Path, device: torch.device, *, trained: bool = False) -> Any:
    """Return a model of transformers from local files, frozen; the target in bfloat16 where there is a GPU."""
    library: Any = transformers  # only half of what is used here is typed
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" and not trained else torch.float32
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).train(False).requires_grad_(False)


def merge_adapters(pair: Pair, target: Any) -> None:
    """Write the values of the merged adapters into the target, a model of transformers."""
    checkpoint = pair.target
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    if head.weight is embedding.weight and not checkpoint.tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for stored, tensor in itertools.chain(target.named_parameters(), target.named_buffers()):
        name = canonical_module(stored)
        name = checkpoint.embedding if tensor is embedding.weight else name
        if name in checkpoint.adapted:
            for start in range(0, len(tensor), _ROWS_AT_ONCE):
                rows = torch.from_numpy(checkpoint.rows(name, start, start + _ROWS_AT_ONCE))
                tensor.data[start : start + len(rows)] = rows.to(tensor)


def save_like(checkpoint: Checkpoint, model: Any, folder: Path) -> None:
    """Write a model's weights under the names and in the dtypes that a checkpoint of it has, with its other files."""
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    folder.mkdir()
    for path in checkpoint.files():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
            continue
        with safe_open(path, framework="pt") as stored:
            dtypes = {name: stored.get_tensor(name).dtype for name in stored.keys()}  # noqa: SIM118  # no mapping
            tensors = {name: weights[name].data.to("cpu", dtype).contiguous() for name, dtype in dtypes.items()}
            save_file(tensors, folder / path.name, metadata=stored.metadata())
