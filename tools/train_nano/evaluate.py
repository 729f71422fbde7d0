"""Measure the pair on held-out text and write the numbers into its model card.

    python tools/train_nano/evaluate.py

Greedy output does not depend on the drafter. So the target writes its text once; then every position is judged as
the beginning of a round, with the keys of that position and before only, and the rounds are walked: this is the
sequential loop with a properly rewound KV cache, computed in parallel. The clustered head is used as exported.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from checkpoints import load_drafter, load_target
from generation import Generator
from model import Drafter, LanguageModel
from nano_ids import BOS, STOP_IDS
from nano_tokenizer import chat_text
from sources import SOURCES
from tokenizers import Tokenizer
from torch import Tensor

BEGIN, END = "<!-- evaluate.py: begin -->", "<!-- evaluate.py: end -->"
MAX_DRAFTS = 6
NEW_TOKENS = 128
DOCUMENTS_PER_KIND, PREFIX_TOKENS = 48, 96
PPL_TOKENS, PPL_ROW = 131_072, 1024
CHAT = (
    "Define ocean.",
    "What does the verb climb mean?",
    "Quote Genesis 1:1.",
    "Write the Python function read_lines(path). Return the lines of the file at path.",
)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """For each text: where generation began, where it ended, and how many drafts each position would get right."""

    begins: list[int]
    ends: list[int]
    matches: Tensor  # [B, T], 0..MAX_DRAFTS
    in_candidates: Tensor  # [steps, B, T], the dense argmax is a candidate


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """BOS and the text's tokens."""
    return [BOS, *tokenizer.encode(text, add_special_tokens=False).ids]


def write_texts(target: LanguageModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[Tensor, list[int]]:
    """Greedy continuations of prompts of any lengths. Shapes: → ids [B, T]; the end of each text, stop id included."""
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    padded = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    generate = Generator(target, len(prompts), width + new_tokens, temperature=1.0, sampled=0)
    ids = generate(padded, torch.tensor(lengths))
    ends = []
    for row, begin in zip(ids.tolist(), lengths, strict=True):
        stops = [i for i in range(begin, begin + new_tokens) if row[i] in STOP_IDS]
        ends.append(stops[0] + 1 if stops else begin + new_tokens)
    return ids, ends


@torch.inference_mode()
def draw(target: LanguageModel, drafter: Drafter, prompts: Sequence[Sequence[int]], new_tokens: int) -> Draws:
    """Write the texts and draft from each of their positions."""
    ids, ends = write_texts(target, prompts, new_tokens)
    hidden, shared = target(ids)
    embedded = target.embed(ids)
    state = hidden
    alive = torch.ones_like(ids, dtype=torch.bool)
    matches = torch.zeros_like(ids)
    found = []
    for j in range(1, MAX_DRAFTS + 1):
        x, state = drafter(torch.roll(embedded, -j, 1), state, shared)
        clustered = drafter.clustered_logits(x)
        alive &= clustered.argmax(-1) == torch.roll(ids, -j - 1, 1)
        matches += alive
        best = drafter.logits(x).argmax(-1, keepdim=True)
        found.append(clustered.gather(-1, best)[..., 0].isfinite())
    return Draws(begins=[len(p) for p in prompts], ends=ends, matches=matches, in_candidates=torch.stack(found))


def walk(draws: Draws, drafts: int) -> tuple[float, list[float]]:
    """Committed tokens per round, and for each draft position the share of rounds that accepted it.

    Prefill commits the first token. A round at t knows token t + 1, drafts what follows and commits the accepted
    drafts and one token of the target.
    """
    rounds = committed = 0
    accepted = [0] * drafts
    for row, (begin, end) in enumerate(zip(draws.begins, draws.ends, strict=True)):
        t = begin - 1
        while t + 2 < end:
            count = min(int(draws.matches[row, t]), drafts, end - t - 2)
            for j in range(count):
                accepted[j] += 1
            step = min(count + 1, end - t - 2)
            rounds, committed, t = rounds + 1, committed + step, t + step
    return committed / max(1, rounds), [a / max(1, rounds) for a in accepted]


def recall(draws: Draws, drafts: int = 4) -> float:
    """The share of draft steps in the generated part whose dense argmax is among the candidates."""
    picked = []
    for row, (begin, end) in enumerate(zip(draws.begins, draws.ends, strict=True)):
        picked.append(draws.in_candidates[:drafts, row, begin - 1 : max(begin, end - drafts - 1)].flatten())
    return float(torch.cat(picked).float().mean())


@torch.inference_mode()
def perplexity(target: LanguageModel, tokenizer: Tokenizer, tokens: np.ndarray) -> tuple[float, float]:
    """Per token, and the bits per UTF-8 byte, over rows of `PPL_ROW` tokens behind BOS."""
    tokens = tokens[: min(PPL_TOKENS, len(tokens) // PPL_ROW * PPL_ROW)]
    rows = torch.from_numpy(tokens.astype(np.int64)).view(-1, PPL_ROW)
    size = len(tokenizer.decode(rows[:, 1:].flatten().tolist(), skip_special_tokens=True).encode())
    rows[:, 0] = BOS
    total = 0.0
    for part in torch.tensor_split(rows, -(-len(rows) // 8)):
        logits = target.logits(target(part[:, :-1])[0])
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    count = rows.numel() - len(rows)
    return math.exp(total / count), total / math.log(2) / size


def held_out_prompts(tokens: np.ndarray, count: int) -> list[list[int]]:
    """The first `PREFIX_TOKENS` tokens of documents, evenly spread over the held-out documents."""
    starts = np.flatnonzero(tokens == BOS)
    lengths = np.diff(np.append(starts, len(tokens)))
    starts = starts[lengths > 2 * PREFIX_TOKENS]
    chosen = starts[np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int)]
    return [tokens[s : s + PREFIX_TOKENS].tolist() for s in chosen]


def acceptance_rows(name: str, draws: Draws) -> list[str]:
    """Table rows for K = 1..MAX_DRAFTS."""
    rows = []
    for drafts in range(1, MAX_DRAFTS + 1):
        committed, accepted = walk(draws, drafts)
        shares = " ".join(f"{100 * a:.0f}" for a in accepted)
        rows.append(f"| {name} | {drafts} | {committed:.2f} | {shares} |")
    return rows


def source_rows(data: Path) -> list[str]:
    """One table row per source; the registry, version, licence and tokens after the near copies were dropped."""
    tokens = json.loads((data / "summary.json").read_text())["tokens_by_source"]
    return [
        f"| {s.registry} `{s.package}` | {s.version} | {s.licence} | {s.kind} | {tokens.get(s.package, 0) / 1e6:.1f} |"
        for s in SOURCES
    ]


def training_lines(nano: Path) -> list[str]:
    """What the two training scripts logged."""
    target = json.loads((nano / "train_target.json").read_text())
    drafter = json.loads((nano / "train_drafter.json").read_text())
    return [
        f"Target: {target['steps']} steps, {target['tokens'] / 1e6:.0f} M tokens, {target['seconds']:.0f} s. "
        f"Drafter: {drafter['generated_tokens'] / 1e6:.0f} M tokens written by the target, {drafter['steps']} steps, "
        f"{drafter['positions'] / 1e6:.0f} M round beginnings, {drafter['seconds']:.0f} s in all. Hardware: one H100.",
    ]


def size_lines(nano: Path, target: LanguageModel, drafter: Drafter) -> list[str]:
    """Parameters and bytes."""
    total = sum(path.stat().st_size for path in nano.rglob("*") if path.is_file())
    counts = [sum(p.numel() for p in model.parameters()) for model in (target, drafter)]
    return [f"Target {counts[0]:,} parameters, drafter {counts[1]:,}; {total:,} bytes with tokenizer, all in bfloat16."]


def report(nano: Path, data: Path, prompts_path: Path) -> str:
    """The generated section of the model card, in Markdown."""
    target, drafter = load_target(nano / "target"), load_drafter(nano / "drafter")
    tokenizer = Tokenizer.from_file(str(nano / "target/tokenizer.json"))
    rows = [json.loads(line) for line in prompts_path.read_text(encoding="utf-8").splitlines()]
    lines = ["### Size and training", "", *size_lines(nano, target, drafter), "", *training_lines(nano), ""]

    lines += ["### Perplexity on held-out text", "", "| text | per token | bits per byte |", "|---|---|---|"]
    arrays = {kind: np.load(data / f"heldout_{kind}.npy") for kind in ("code", "prose")}
    for kind, tokens in arrays.items():
        per_token, per_byte = perplexity(target, tokenizer, tokens)
        lines.append(f"| {kind} | {per_token:.2f} | {per_byte:.3f} |")

    title = "### Committed tokens per round, greedy, clustered head as exported"
    header = "| held-out text | K | committed per round | rounds that accept draft 1, 2, … (%) |"
    lines += ["", title, "", header, "|---|---|---|---|"]
    recalls = []
    for kind, tokens in arrays.items():
        prompts = [encode(tokenizer, row["text"]) for row in rows if row["kind"] == kind]
        draws = draw(target, drafter, prompts, NEW_TOKENS)
        lines += acceptance_rows(f"{kind}, {len(prompts)} prompts", draws)
        recalls.append(f"| {kind}, {len(prompts)} prompts | {100 * recall(draws):.2f} |")
        more = held_out_prompts(tokens, DOCUMENTS_PER_KIND)
        draws = draw(target, drafter, more, NEW_TOKENS)
        lines += acceptance_rows(f"{kind}, {len(more)} documents", draws)
        recalls.append(f"| {kind}, {len(more)} documents | {100 * recall(draws):.2f} |")
    clusters = drafter.masked_embedding.centroids.out_features
    lines += ["", f"### Clustered head: {drafter.top_k} of {clusters} clusters", ""]
    lines += ["| held-out text | dense argmax among the candidates (%) |", "|---|---|", *recalls]

    lines += ["", "### Chat", ""]
    questions = [encode(tokenizer, chat_text(question)) for question in CHAT]
    ids, ends = write_texts(target, questions, NEW_TOKENS)
    for question, prompt, row, end in zip(CHAT, questions, ids.tolist(), ends, strict=True):
        answer = tokenizer.decode(row[len(prompt) : end], skip_special_tokens=False)
        lines += [f"> {question}", "", "```", answer, "```", ""]
    lines += ["### Sources", "", "Code was cut at random to 30 M tokens in all; prose was seen 1.5 times an epoch.", ""]
    lines += ["| package | version | licence | kind | M tokens before the cut |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *source_rows(data)])


def main() -> None:
    """Measure, print, and replace the card's generated section."""
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nano", type=Path, default=root / "converter/mtp_export/nano")
    parser.add_argument("--data", type=Path, default=root / "build/nano_data")
    parser.add_argument("--prompts", type=Path, default=root / "calibration/mtp_calibration/prompts/heldout.jsonl")
    options = parser.parse_args()
    section = report(options.nano, options.data, options.prompts)
    print(section)
    card = options.nano / "MODEL_CARD.md"
    text = card.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    card.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
