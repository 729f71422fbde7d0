"""nano's tokenizer: BPE with byte fallback in SentencePiece's manner, lossless for any text without U+2581.

Ids 0–3 are <pad> <eos> <bos> <unk>; 105 and 106 are the turn tokens, as in Gemma 4; the 256 byte tokens fill the
ids around them; characters and merges follow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nano_ids import BOS, EOS, PAD, TURN_CLOSE, TURN_OPEN, UNK, VOCAB_SIZE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

SPECIAL = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "<unk>": UNK, "<|turn>": TURN_OPEN, "<turn|>": TURN_CLOSE}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_RUNS = ["▁" * n for n in (2, 3, 4, 8, 12, 16)] + ["\n" * n for n in (1, 2, 3)] + ["\t", "\t\t"]
_RUNS += ["\n" + "▁" * n for n in (4, 8, 12, 16, 20)] + ["\n\n▁▁▁▁", "\n\n▁▁▁▁▁▁▁▁"]
# A line break with its indentation; a word with at most one sign or space before it; up to three digits; signs.
_SPLIT = r"\n[\n▁]*|[^\p{L}\p{N}\s]?\p{L}+|\p{N}{1,3}|▁?[^\p{L}\p{N}\s▁]+|▁+(?=▁)|▁+|\s"

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<|turn>' + role + '\\n' + (message['content'] | trim) + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def _shell(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merge_runs(merges: list[tuple[str, str]], known: set[str]) -> list[tuple[str, str]]:
    """The merges that build each run of `_RUNS` that training did not find, longest known prefix first."""
    extra: list[tuple[str, str]] = []
    for run in sorted(_RUNS, key=len):
        if len(run) > 1 and run not in known:
            cut = max(n for n in range(1, len(run)) if run[:n] in known and run[n:] in known)
            extra.append((run[:cut], run[cut:]))
            known.add(run)
    return merges + extra


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn 4096 tokens from `texts`; the same texts in the same order give the same tokenizer."""
    draft = _shell(BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        limit_alphabet=128,
        initial_alphabet=[chr(c) for c in range(33, 127)] + ["▁", "\n", "\t"],
        max_token_length=20,
        show_progress=False,
    )
    draft.train_from_iterator(texts, trainer)
    learned: dict[str, Any] = json.loads(draft.to_str())["model"]
    merges = [(left, right) for left, right in learned["merges"]]
    merged = {left + right for left, right in merges}
    characters = sorted(set(learned["vocab"]) - merged)
    room = VOCAB_SIZE - len(SPECIAL) - len(_BYTES) - len(characters) - len(_RUNS)
    merges = _merge_runs(merges[:room], set(characters) | {a + b for a, b in merges[:room]})
    ordered = characters + list(dict.fromkeys(a + b for a, b in merges))

    vocab = dict(SPECIAL)
    taken = set(SPECIAL.values())
    free = [n for n in range(VOCAB_SIZE) if n not in taken]
    names = [*_BYTES, *ordered]
    names += [f"<unused{n}>" for n in range(len(free) - len(names))]
    vocab.update(zip(names, free, strict=True))
    tokenizer = _shell(BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def chat_text(question: str, answer: str | None = None) -> str:
    """One exchange in the chat template, without BOS; open for the model's turn if there is no answer."""
    prompt = f"<|turn>user\n{question.strip()}<turn|>\n<|turn>model\n"
    return prompt if answer is None else f"{prompt}{answer.strip()}<turn|>"
