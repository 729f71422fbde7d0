"""transformers as the reference: the checkpoint itself, greedily, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from mtp_runtime.measure.parity import common_length


def greedy(folder: Path, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return transformers' greedy continuation of each prompt, up to and including the first token that differs from
    `outputs`.

    One pass over prompt and output gives the choice at every position. As long as the choices are the output's own
    tokens, each was made after the same tokens as in a generation step by step; so this is the greedy continuation,
    at a hundredth of its time. What the folder's generation_config suppresses is not chosen.
    """
    library: Any = transformers  # only half of what is used here is typed
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.train(False)
    suppressed = [
        i for i in model.generation_config.suppress_tokens or () if 0 <= i < model.get_output_embeddings().out_features
    ]
    continuations = []
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *output[:-1]]]), use_cache=False).logits[0]
        logits[:, suppressed] = -torch.inf
        choices = logits[len(prompt) - 1 :].argmax(-1).tolist()
        continuations.append(choices[: common_length(choices, output) + 1])
    return continuations
