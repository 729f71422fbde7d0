"""Texts that the target writes itself, which the drafter learns from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tools.train_nano.generation import Generator
from tools.train_nano.model import LanguageModel
from tools.train_nano.nano_ids import STOP_IDS
from tools.train_nano.training import Clock, Corpus

SEED = 11
LENGTH = 512
PROMPT_LENGTHS = (24, 64, 128, 192, 288)
SAMPLED_SHARE, TEMPERATURE = 0.2, 0.7
CHAT_PROMPT, CHAT_ANSWER = 256, 128


def own_outputs(model: LanguageModel, corpus: Corpus, batches: int, batch: int, clock: Clock) -> Tensor:
    """Return texts that the target wrote behind training prefixes. Shapes: → [batches * batch, LENGTH], int16."""
    rng = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    device = model.embed_tokens.weight.device
    generate = Generator(model, batch, LENGTH, TEMPERATURE, int(batch * SAMPLED_SHARE))
    texts = []
    for number in range(batches):
        size = PROMPT_LENGTHS[number % len(PROMPT_LENGTHS)]
        prompts = torch.from_numpy(corpus.prompts(rng, batch, size)).to(device)
        texts.append(generate(prompts, torch.full((batch,), size, device=device)).to(torch.int16))
        if number in (0, 1) or (number + 1) % 10 == 0:
            print(f"{clock():.0f} s: {(number + 1) * batch * LENGTH / 1e6:.1f} M tokens generated", flush=True)
    return torch.cat(texts)


def own_answers(model: LanguageModel, corpus: Corpus, batches: int, batch: int) -> Tensor:
    """Return conversations with the target's own next turn, to its stop token, one after the other in rows.

    Shapes: → [rows, LENGTH], int16.
    """
    rng = np.random.default_rng(SEED + 1)
    device = model.embed_tokens.weight.device
    generate = Generator(model, batch, CHAT_PROMPT + CHAT_ANSWER, TEMPERATURE, int(batch * SAMPLED_SHARE))
    texts = []
    for _ in range(batches):
        prompts, lengths = corpus.chat_prompts(rng, batch, CHAT_PROMPT)
        ids = generate(torch.from_numpy(prompts).to(device), torch.tensor(lengths, device=device)).cpu().numpy()
        for row, begin in zip(ids, lengths, strict=True):
            stops = np.flatnonzero(np.isin(row[begin : begin + CHAT_ANSWER], STOP_IDS))
            texts.append(row[: begin + (int(stops[0]) + 1 if len(stops) else CHAT_ANSWER)])
    flat = np.concatenate([texts[i] for i in rng.permutation(len(texts))]).astype(np.int16)
    return torch.from_numpy(flat[: len(flat) // LENGTH * LENGTH].reshape(-1, LENGTH)).to(device)
