"""transformers as the reference: what the checkpoint itself says, greedily, in float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers


def greedy(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    on_prompt: Callable[[], None] = lambda: None,
) -> tuple[list[list[int]], float]:
    """Continue prompts of token ids with the target checkpoint in `folder`.

    Returns:
        The new tokens of each, a stop id included, and the seconds that all took.
    """
    library: Any = transformers  # only half of what is used here is typed
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    model.generation_config.eos_token_id = sorted(stop_token_ids)
    outputs = []
    started = time.perf_counter()
    for ids in prompts:
        out = model.generate(torch.tensor([list(ids)]), max_new_tokens=max_new_tokens, do_sample=False)
        outputs.append(out[0, len(ids) :].tolist())
        on_prompt()
    return outputs, time.perf_counter() - started
