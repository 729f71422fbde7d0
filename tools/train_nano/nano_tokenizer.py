"""nano's tokenizer: BPE with byte fallback in Gemma's manner, lossless for any text without U+2581.

Special tokens have the published ids, the media tokens nano's last seven; bytes fill the ids between; characters and
merges follow. As in Gemma nothing cuts a text before its merges (a space becomes U+2581 first, so that the published
pre-tokenizer, a split at spaces, finds none): this is what SentencePiece does too. To make the same ids there, where
any two neighbours merge whose text is a piece, the pieces that have several ways to come about have them all in
tokenizer.json, ranked by the piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from mtp_runtime.text.chat import render_chat
from tools.train_nano import nano_ids as ids

# Those that SentencePiece calls control symbols: a text cannot say them there.
CONTROL = {"<pad>": ids.PAD, "<eos>": ids.EOS, "<bos>": ids.BOS}
SPECIAL = CONTROL | {
    "<unk>": ids.UNK,
    "<|tool>": ids.TOOL_OPEN,
    "<tool|>": ids.TOOL_CLOSE,
    "<|tool_call>": ids.CALL_OPEN,
    "<tool_call|>": ids.CALL_CLOSE,
    "<|tool_response>": ids.RESPONSE_OPEN,
    "<tool_response|>": ids.RESPONSE_CLOSE,
    '<|"|>': ids.QUOTE,
    "<|think|>": ids.THINK,
    "<|channel>": ids.CHANNEL_OPEN,
    "<channel|>": ids.CHANNEL_CLOSE,
    "<|turn>": ids.TURN_OPEN,
    "<turn|>": ids.TURN_CLOSE,
    "<|image>": ids.IMAGE_OPEN,
    "<|audio>": ids.AUDIO_OPEN,
    "<|image|>": ids.IMAGE,
    "<|audio|>": ids.AUDIO,
    "<image|>": ids.IMAGE_CLOSE,
    "<audio|>": ids.AUDIO_CLOSE,
    "<|video|>": ids.VIDEO,
}
# What tokenizer_config.json names them, by which a processor asks for them.
NAMED = {
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "boi_token": "<|image>",
    "eoa_token": "<audio|>",
    "eoc_token": "<channel|>",
    "eoi_token": "<image|>",
    "eot_token": "<turn|>",
    "escape_token": '<|"|>',
    "etc_token": "<tool_call|>",
    "etd_token": "<tool|>",
    "etr_token": "<tool_response|>",
    "image_token": "<|image|>",
    "soc_token": "<|channel>",
    "sot_token": "<|turn>",
    "stc_token": "<|tool_call>",
    "std_token": "<|tool>",
    "str_token": "<|tool_response>",
    "think_token": "<|think|>",
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"
# Runs by powers of two alone, which come about in one way only; then a line break with its indentation.
_RUNS = [SPACE * n for n in (2, 4, 8, 16)] + ["\n\n", "\t\t"]
_RUNS += ["\n" + SPACE * n for n in (4, 8, 12, 16, 20)] + ["\n\n" + SPACE * n for n in (4, 8)]
# What a piece may be: a word with at most one sign or space before it, a digit, signs. Nothing with a line break.
_WORDS = r"\n|[^\p{L}\p{N}\s]?\p{L}+|\p{N}|▁?[^\p{L}\p{N}\s▁]+|▁|\s"
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def _one_character(piece: str) -> bool:
    return len(piece) > 1 and len(set(piece)) == 1


def _learned(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the characters, and the pieces in the order of their merges."""
    draft = Tokenizer(BPE())
    draft.normalizer = normalizers.Replace(" ", SPACE)
    draft.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=ids.VOCAB_SIZE,
        limit_alphabet=128,
        initial_alphabet=[chr(c) for c in range(33, 127)] + [SPACE, "\n", "\t"],
        max_token_length=20,
        show_progress=False,
    )
    draft.train_from_iterator(texts, trainer)
    learned: dict[str, Any] = json.loads(draft.to_str())["model"]
    pieces = list(dict.fromkeys(left + right for left, right in learned["merges"]))
    return sorted(set(learned["vocab"]) - set(pieces)), pieces


def ways(pieces: Sequence[str], known: set[str]) -> list[tuple[str, str]]:
    """Return every pair of known texts that makes a piece, ranked by the piece, then by its parts' ranks."""
    rank = {piece: number for number, piece in enumerate(pieces)}
    pairs: list[tuple[str, str]] = []
    for piece in pieces:
        cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        made = [pair for pair in cuts if pair[0] in known and pair[1] in known]
        pairs += sorted(made, key=lambda pair: (rank.get(pair[0], -1), rank.get(pair[1], -1)))
    return pairs


def _tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def without_special(text: str) -> str:
    """Return the text with a line break for each special token, of which no piece is to be learned."""
    return re.sub("|".join(map(re.escape, SPECIAL)), "\n", text)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn 4096 tokens from `texts`; the same texts in the same order give the same tokenizer."""
    characters, learned = _learned(texts)
    powers = [piece for piece in learned if not _one_character(piece) or len(piece).bit_count() == 1]
    pieces = list(dict.fromkeys([*_RUNS, *powers]))
    pieces = pieces[: ids.VOCAB_SIZE - len(SPECIAL) - len(BYTES) - len(characters)]
    # A piece that its own merges do not lead to would never be said.
    while True:
        merges = ways(pieces, {*characters, *pieces})
        probe = Tokenizer(BPE(vocab={t: n for n, t in enumerate([*characters, *pieces])}, merges=merges))
        reached = [piece for piece in pieces if len(probe.encode(piece).ids) == 1]
        if len(reached) == len(pieces):
            break
        pieces = reached
    assert not SPECIAL.keys() & set(pieces)
    taken = set(SPECIAL.values())
    free = [n for n in range(ids.VOCAB_SIZE) if n not in taken]
    names = [*BYTES, *characters, *pieces]
    names += [f"<unused{n}>" for n in range(len(free) - len(names))]
    vocab = SPECIAL | dict(zip(names, free, strict=True))
    return _tokenizer(vocab, merges)


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
        "extra_special_tokens": NAMED,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    thinking: bool = False,
    open_turn: bool = True,
) -> str:
    """Return what nano's chat template makes of a conversation, without BOS."""
    options: dict[str, Any] = {"tools": tools or None, "enable_thinking": thinking, "add_generation_prompt": open_turn}
    return render_chat(CHAT_TEMPLATE, messages, **options)
