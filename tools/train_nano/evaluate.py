"""Measure the pair on held-out text and write the numbers into its model card.

    python -m tools.train_nano.evaluate

Greedy output does not depend on the drafter. So the target writes its text once; then every position is judged as
the beginning of a round, with the keys of that position and before only, and the rounds are walked: this is the
sequential loop with a properly rewound KV cache, computed in parallel. The clustered head is used as exported.

A small model's greedy text soon repeats itself, and repeated text is easy to draft. So acceptance is given on the
beginning of each text that does not loop, and on whole texts apart.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_nano.chats import (
    NEW_TOKENS,
    answers,
    chat_rows,
    encode,
    first_prompt,
    second_prompt,
    undeclared,
    write_texts,
)
from tools.train_nano.checkpoints import load_drafter, load_target
from tools.train_nano.dialogues import TOOLS, Message, digest, held_out
from tools.train_nano.model import Drafter, LanguageModel
from tools.train_nano.nano_ids import BOS
from tools.train_nano.nano_tokenizer import chat_prompt
from tools.train_nano.sources import SOURCES

BEGIN, END = "<!-- evaluate.py: begin -->", "<!-- evaluate.py: end -->"
MAX_DRAFTS = 6
DOCUMENTS_PER_KIND, PREFIX_TOKENS = 96, 96
GRAM, MOST_REPEATED = 4, 0.2  # a text loops where more than this share of its 4-grams were in it before
PPL_TOKENS, PPL_ROW = 131_072, 1024
BATCH = 16
CHAT = (
    "What does the verb climb mean?",
    "What is 7 plus 5?",
    "Sort these words: train, apple, moon.",
    "Write a Python function that reads the lines of a file.",
    "What does blorfin mean?",
    "Who won the match yesterday?",
)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A text: where generation began and ended, and how many drafts each of its positions would get right."""

    ids: list[int]
    begin: int
    end: int
    matches: Tensor  # [T], 0..MAX_DRAFTS
    in_candidates: Tensor  # [steps, T], the dense argmax is a candidate


@torch.inference_mode()
def draw(target: LanguageModel, drafter: Drafter, texts: Sequence[list[int]], begins: Sequence[int]) -> list[Drawn]:
    """Draft from every position of texts of any lengths."""
    found = []
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        width = max(len(texts[i]) for i in chosen)
        ids = torch.tensor([texts[i] + [0] * (width - len(texts[i])) for i in chosen])
        hidden, shared = target(ids)
        embedded, state = target.embed(ids), hidden
        alive = torch.ones_like(ids, dtype=torch.bool)
        matches = torch.zeros_like(ids)
        candidates = []
        for j in range(1, MAX_DRAFTS + 1):
            x, state = drafter(torch.roll(embedded, -j, 1), state, shared)
            clustered = drafter.clustered_logits(x)
            alive &= clustered.argmax(-1) == torch.roll(ids, -j - 1, 1)
            matches += alive
            best = drafter.logits(x).argmax(-1, keepdim=True)
            candidates.append(clustered.gather(-1, best)[..., 0].isfinite())
        inside = torch.stack(candidates)
        found += [
            Drawn(ids=texts[i], begin=begins[i], end=len(texts[i]), matches=matches[row], in_candidates=inside[:, row])
            for row, i in enumerate(chosen)
        ]
    return found


def before_it_loops(drawn: Drawn) -> Drawn:
    """The longest beginning of the text in which at most `MOST_REPEATED` of the 4-grams were there before."""
    seen: set[tuple[int, ...]] = set()
    repeated, end = 0, drawn.begin
    for last in range(drawn.begin, drawn.end):
        first = last - GRAM + 1
        if first >= drawn.begin:
            gram = tuple(drawn.ids[first : last + 1])
            repeated += gram in seen
            seen.add(gram)
        if repeated <= MOST_REPEATED * max(1, first - drawn.begin + 1):
            end = last + 1
    return replace(drawn, end=end)


def walk(texts: Sequence[Drawn], drafts: int) -> tuple[float, list[float]]:
    """Committed tokens per round, and for each draft position the share of rounds that accepted it.

    Prefill commits the first token. A round at t knows token t + 1, drafts what follows and commits the accepted
    drafts and one token of the target.
    """
    rounds = committed = 0
    accepted = [0] * drafts
    for text in texts:
        t = text.begin - 1
        while t + 2 < text.end:
            count = min(int(text.matches[t]), drafts, text.end - t - 2)
            for j in range(count):
                accepted[j] += 1
            step = min(count + 1, text.end - t - 2)
            rounds, committed, t = rounds + 1, committed + step, t + step
    return committed / max(1, rounds), [a / max(1, rounds) for a in accepted]


def recall(texts: Sequence[Drawn], drafts: int = 4) -> float:
    """The share of draft steps in the generated part whose dense argmax is among the candidates."""
    parts = [text.in_candidates[:drafts, text.begin - 1 : max(text.begin, text.end - drafts - 1)] for text in texts]
    return float(torch.cat([part.flatten() for part in parts]).float().mean())


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


def acceptance_rows(name: str, texts: Sequence[Drawn]) -> list[str]:
    """Table rows for K = 1..MAX_DRAFTS."""
    rows = []
    for drafts in range(1, MAX_DRAFTS + 1):
        committed, accepted = walk(texts, drafts)
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
    """What the training scripts logged."""
    target, drafter, tuned, went_on = (
        json.loads((nano / f"{name}.json").read_text())
        for name in ("train_target", "train_drafter", "tune_target", "tune_drafter")
    )
    return [
        f"Target: {target['steps']} steps, {target['tokens'] / 1e6:.0f} M tokens, {target['seconds']:.0f} s. "
        f"Drafter: {drafter['generated_tokens'] / 1e6:.0f} M tokens written by the target, {drafter['steps']} steps, "
        f"{drafter['positions'] / 1e6:.0f} M round beginnings, {drafter['seconds']:.0f} s in all. "
        f"Then the target was tuned on conversations that begin a row, {tuned['steps']} steps, "
        f"{tuned['tokens'] / 1e6:.0f} M tokens, {tuned['seconds']:.0f} s, and the drafter went on with it, "
        f"{went_on['steps']} steps, {went_on['seconds']:.0f} s. Hardware: one {target['hardware']}.",
    ]


def size_lines(nano: Path, target: LanguageModel, drafter: Drafter) -> list[str]:
    """Parameters and bytes."""
    total = sum(path.stat().st_size for path in nano.rglob("*") if path.is_file())
    counts = [sum(p.numel() for p in model.parameters()) for model in (target, drafter)]
    return [f"Target {counts[0]:,} parameters, drafter {counts[1]:,}; {total:,} bytes with tokenizer, all in bfloat16."]


def continued(target: LanguageModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The prompts with what the target says, up to its stop token."""
    rows, ends = write_texts(target, prompts, NEW_TOKENS)
    return [row[:end] for row, end in zip(rows.tolist(), ends, strict=True)]


def examples(target: LanguageModel, tokenizer: Tokenizer) -> list[str]:
    """Conversations as the target goes on with them: questions, a tool's call and its answer, a thought."""
    asked: list[tuple[str, list[Message], bool, bool]] = [
        (question, [{"role": "user", "content": question}], False, False) for question in CHAT
    ]
    question = "What is 231 plus 84?"
    user: Message = {"role": "user", "content": question}
    call = {"function": {"name": "add", "arguments": {"a": 231, "b": 84}}}
    answered: list[Message] = [
        user,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": {"result": 315}},
    ]
    asked.append((f"{question} (with tools)", [user], True, False))
    asked.append((f"{question} (with tools, and the answer 315)", answered, True, False))
    asked.append(("Spell harbour. (thinking)", [{"role": "user", "content": "Spell harbour."}], False, True))
    lines = []
    for title, messages, with_tools, thinking in asked:
        tools = tuple(TOOLS.values()) if with_tools else ()
        prompt = encode(tokenizer, chat_prompt(messages, tools, thinking=thinking))
        said = continued(target, [prompt])[0][len(prompt) :]
        lines += [f"> {title}", "", "````", tokenizer.decode(said, skip_special_tokens=False), "````", ""]
    return lines


def report(nano: Path, data: Path) -> str:
    """The generated section of the model card, in Markdown."""
    target, drafter = load_target(nano / "target"), load_drafter(nano / "drafter")
    tokenizer = Tokenizer.from_file(str(nano / "target/tokenizer.json"))
    lines = ["### Size and training", "", *size_lines(nano, target, drafter), "", *training_lines(nano), ""]

    lines += ["### Perplexity on held-out text", "", "| text | per token | bits per byte |", "|---|---|---|"]
    arrays = {kind: np.load(data / f"heldout_{kind}.npy") for kind in ("code", "prose")}
    for kind, tokens in arrays.items():
        per_token, per_byte = perplexity(target, tokenizer, tokens)
        lines.append(f"| {kind} | {per_token:.2f} | {per_byte:.3f} |")

    prompts = held_out()
    plain, tool = [p for p in prompts if not p.calls], [p for p in prompts if p.calls]
    said = answers(target, tokenizer, plain, [first_prompt(tokenizer, p) for p in plain])
    calling = answers(target, tokenizer, tool, [first_prompt(tokenizer, p) for p in tool])
    thinking = answers(target, tokenizer, plain, [first_prompt(tokenizer, p, thinking=True) for p in plain])
    bare = [undeclared(p) for p in tool]
    refusing = answers(target, tokenizer, bare, [first_prompt(tokenizer, p) for p in bare])
    using = answers(target, tokenizer, tool, [second_prompt(tokenizer, p) for p in tool])
    lines += ["", f"### {len(plain)} held-out questions and {len(tool)} prompts that need a tool, greedy", ""]
    lines += [f"Made by `tools/train_nano/dialogues.py`; questions and answers have the sha256 {digest(prompts)}."]
    lines += ["", "| prompts | | |", "|---|---|---|", *chat_rows(said, thinking, calling, using, refusing)]

    texts: dict[str, list[Drawn]] = {}
    for kind, tokens in arrays.items():
        beginnings = held_out_prompts(tokens, DOCUMENTS_PER_KIND)
        written = continued(target, beginnings)
        texts[f"{kind}, {len(written)} documents"] = draw(target, drafter, written, [len(p) for p in beginnings])
    for name, given in (("questions", said), ("tool calls", calling), ("tools' answers used", using)):
        rows, begins = [a.prompt_ids + a.ids for a in given], [len(a.prompt_ids) for a in given]
        texts[f"{name}, {len(given)}"] = draw(target, drafter, rows, begins)
    fresh = {name: [before_it_loops(text) for text in drawn] for name, drawn in texts.items()}
    header = "| text | K | committed per round | rounds that accept draft 1, 2, … (%) |"
    title = "### Committed tokens per round, greedy, clustered head as exported"
    lines += ["", f"{title}: text that does not loop", ""]
    lines += [f"Each text to where more than {100 * MOST_REPEATED:.0f} % of its {GRAM}-grams were in it before.", ""]
    lines += ["| text | tokens | of |", "|---|---|---|"]
    for name, drawn in texts.items():
        kept, whole = (sum(text.end - text.begin for text in group) for group in (fresh[name], drawn))
        lines.append(f"| {name} | {kept} | {whole} |")
    lines += ["", header, "|---|---|---|---|"]
    for name, drawn in fresh.items():
        lines += acceptance_rows(name, drawn)
    lines += ["", f"{title}: whole texts of {NEW_TOKENS} tokens, loops included", "", header, "|---|---|---|---|"]
    for name, drawn in texts.items():
        if "documents" in name:
            lines += acceptance_rows(name, drawn)

    clusters = drafter.masked_embedding.centroids.out_features
    lines += ["", f"### Clustered head: {drafter.top_k} of {clusters} clusters", ""]
    lines += ["| text that does not loop | dense argmax among the candidates (%) |", "|---|---|"]
    lines += [f"| {name} | {100 * recall(drawn):.2f} |" for name, drawn in fresh.items()]

    lines += ["", "### Chats, for a look (not held out)", "", *examples(target, tokenizer)]
    counts = json.loads((data / "summary.json").read_text())["train_tokens"]
    lines += ["### Sources", ""]
    lines += ["Code was cut at random to 24 M tokens in all; prose was seen 1.5 times an epoch."]
    lines += [f"Chats, {counts['chat'] / 1e6:.0f} M tokens: made by `tools/train_nano/dialogues.py`, CC0-1.0.", ""]
    lines += ["| package | version | licence | kind | M tokens before the cut |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *source_rows(data)])


def main() -> None:
    """Measure, print, and replace the card's generated section."""
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nano", type=Path, default=root / "converter/mtp_export/nano")
    parser.add_argument("--data", type=Path, default=root / "build/nano_data")
    options = parser.parse_args()
    section = report(options.nano, options.data)
    print(section)
    card = options.nano / "MODEL_CARD.md"
    text = card.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    card.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
