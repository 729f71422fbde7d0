"""Measure the pair on held-out text and write the numbers into its model card.

    python -m tools.train_nano.evaluate

A small model's greedy text soon repeats itself, and repeated text is easy to draft. So acceptance is given on the
beginning of each text that does not loop, and on whole texts apart.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from tools.train_nano.chats import (
    NEW_TOKENS,
    Answer,
    Answers,
    answers,
    chat_rows,
    encode,
    first_prompt,
    second_prompt,
    undeclared,
    write_texts,
)
from tools.train_nano.checkpoints import load_drafter, load_target
from tools.train_nano.dialogues import TOOLS, Message, Prompt, digest, held_out
from tools.train_nano.model import Drafter, LanguageModel
from tools.train_nano.nano_ids import BOS
from tools.train_nano.nano_tokenizer import chat_prompt
from tools.train_nano.rounds import GRAM, MOST_REPEATED, Drawn, acceptance_rows, before_it_loops, draw, recall
from tools.train_nano.sources import SOURCES

BEGIN, END = "<!-- evaluate.py: begin -->", "<!-- evaluate.py: end -->"
DOCUMENTS_PER_KIND, PREFIX_TOKENS = 96, 96
PPL_TOKENS, PPL_ROW = 131_072, 1024
CHAT = (
    "What does the verb climb mean?",
    "What is 7 plus 5?",
    "Sort these words: train, apple, moon.",
    "Write a Python function that reads the lines of a file.",
    "What does blorfin mean?",
    "Who won the match yesterday?",
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The models that are measured, and their tokenizer."""

    target: LanguageModel
    drafter: Drafter
    tokenizer: Tokenizer


@torch.inference_mode()
def perplexity(target: LanguageModel, tokenizer: Tokenizer, tokens: np.ndarray) -> tuple[float, float]:
    """Return the perplexity per token, and the bits per UTF-8 byte, over rows of `PPL_ROW` tokens behind BOS."""
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
    """Return the first `PREFIX_TOKENS` tokens of documents, evenly spread over the held-out documents."""
    starts = np.flatnonzero(tokens == BOS)
    lengths = np.diff(np.append(starts, len(tokens)))
    starts = starts[lengths > 2 * PREFIX_TOKENS]
    chosen = starts[np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int)]
    return [tokens[s : s + PREFIX_TOKENS].tolist() for s in chosen]


def source_rows(data: Path) -> list[str]:
    """Return one table row per source; the registry, version, licence and tokens after the near copies were dropped."""
    tokens = json.loads((data / "summary.json").read_text())["tokens_by_source"]
    return [
        f"| {s.registry} `{s.package}` | {s.version} | {s.licence} | {s.kind} | {tokens.get(s.package, 0) / 1e6:.1f} |"
        for s in SOURCES
    ]


def training_lines(nano: Path) -> list[str]:
    """Return the log of the training scripts."""
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
    """Return the count of parameters and of bytes."""
    total = sum(path.stat().st_size for path in nano.rglob("*") if path.is_file())
    counts = [sum(p.numel() for p in model.parameters()) for model in (target, drafter)]
    return [f"Target {counts[0]:,} parameters, drafter {counts[1]:,}; {total:,} bytes with tokenizer, all in bfloat16."]


def continued(target: LanguageModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return the prompts with what the target writes behind them, up to its stop token."""
    rows, ends = write_texts(target, prompts, NEW_TOKENS)
    return [row[:end] for row, end in zip(rows.tolist(), ends, strict=True)]


def examples(target: LanguageModel, tokenizer: Tokenizer) -> list[str]:
    """Return conversations as the target goes on with them: questions, a tool's call and its answer, a thought."""
    prompts: list[tuple[str, list[Message], bool, bool]] = [
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
    prompts.append((f"{question} (with tools)", [user], True, False))
    prompts.append((f"{question} (with tools, and the answer 315)", answered, True, False))
    prompts.append(("Spell harbour. (thinking)", [{"role": "user", "content": "Spell harbour."}], False, True))
    lines = []
    for title, messages, with_tools, thinking in prompts:
        tools = tuple(TOOLS.values()) if with_tools else ()
        prompt = encode(tokenizer, chat_prompt(messages, tools, thinking=thinking))
        reply = continued(target, [prompt])[0][len(prompt) :]
        lines += [f"> {title}", "", "````", tokenizer.decode(reply, skip_special_tokens=False), "````", ""]
    return lines


def chat_answers(pair: Pair, prompts: Sequence[Prompt]) -> Answers:
    """Let the target answer the held-out questions in all ways that the card reports."""
    plain, tool = [p for p in prompts if not p.calls], [p for p in prompts if p.calls]
    bare = [undeclared(p) for p in tool]

    def answered(prompts: Sequence[Prompt], texts: Sequence[list[int]]) -> list[Answer]:
        return answers(pair.target, pair.tokenizer, prompts, texts)

    return Answers(
        plain=answered(plain, [first_prompt(pair.tokenizer, p) for p in plain]),
        calling=answered(tool, [first_prompt(pair.tokenizer, p) for p in tool]),
        thinking=answered(plain, [first_prompt(pair.tokenizer, p, thinking=True) for p in plain]),
        refusing=answered(bare, [first_prompt(pair.tokenizer, p) for p in bare]),
        using=answered(tool, [second_prompt(pair.tokenizer, p) for p in tool]),
    )


def drawn_texts(pair: Pair, arrays: Mapping[str, np.ndarray], replies: Answers) -> dict[str, list[Drawn]]:
    """Draft along the continued documents and the answers."""
    texts: dict[str, list[Drawn]] = {}
    for kind, tokens in arrays.items():
        beginnings = held_out_prompts(tokens, DOCUMENTS_PER_KIND)
        written = continued(pair.target, beginnings)
        begins = [len(p) for p in beginnings]
        texts[f"{kind}, {len(written)} documents"] = draw(pair.target, pair.drafter, written, begins)
    groups = (("questions", replies.plain), ("tool calls", replies.calling), ("tools' answers used", replies.using))
    for name, group in groups:
        rows, begins = [a.prompt_ids + a.ids for a in group], [len(a.prompt_ids) for a in group]
        texts[f"{name}, {len(group)}"] = draw(pair.target, pair.drafter, rows, begins)
    return texts


def acceptance_lines(texts: Mapping[str, list[Drawn]], fresh: Mapping[str, list[Drawn]]) -> list[str]:
    """Return the tables of committed tokens per round: of `texts` without their loops, `fresh`, and whole."""
    header = "| text | K | committed per round | rounds that accept draft 1, 2, … (%) |"
    title = "### Committed tokens per round, greedy, clustered head as exported"
    lines = ["", f"{title}: text that does not loop", ""]
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
    return lines


def report(nano: Path, data: Path) -> str:
    """Return the generated section of the model card, in Markdown."""
    tokenizer = Tokenizer.from_file(str(nano / "target/tokenizer.json"))
    pair = Pair(target=load_target(nano / "target"), drafter=load_drafter(nano / "drafter"), tokenizer=tokenizer)
    sizes = size_lines(nano, pair.target, pair.drafter)
    lines = ["### Size and training", "", *sizes, "", *training_lines(nano), ""]

    lines += ["### Perplexity on held-out text", "", "| text | per token | bits per byte |", "|---|---|---|"]
    arrays = {kind: np.load(data / f"heldout_{kind}.npy") for kind in ("code", "prose")}
    for kind, tokens in arrays.items():
        per_token, per_byte = perplexity(pair.target, tokenizer, tokens)
        lines.append(f"| {kind} | {per_token:.2f} | {per_byte:.3f} |")

    prompts = held_out()
    replies = chat_answers(pair, prompts)
    questions, tools = len(replies.plain), len(replies.calling)
    lines += ["", f"### {questions} held-out questions and {tools} prompts that need a tool, greedy", ""]
    lines += [f"Made by `tools/train_nano/dialogues.py`; questions and answers have the sha256 {digest(prompts)}."]
    lines += ["", "| prompts | | |", "|---|---|---|", *chat_rows(replies)]

    texts = drawn_texts(pair, arrays, replies)
    fresh = {name: [before_it_loops(text) for text in drawn] for name, drawn in texts.items()}
    lines += acceptance_lines(texts, fresh)

    drafter = pair.drafter
    lines += ["", f"### Clustered head: {drafter.top_k} of {drafter.masked_embedding.centroids.out_features} clusters"]
    lines += ["", "| text that does not loop | dense argmax among the candidates (%) |", "|---|---|"]
    lines += [f"| {name} | {100 * recall(drawn):.2f} |" for name, drawn in fresh.items()]

    lines += ["", "### Chats, for a look (not held out)", "", *examples(pair.target, tokenizer)]
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
