"""nano's tokenizer.json as a SentencePiece model: the same pieces under the same ids, merged in the same order."""

from __future__ import annotations

import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as proto

from tools.train_nano.nano_tokenizer import BYTES, CONTROL, SPECIAL


def sentencepiece_model(tokenizer_json: Path) -> bytes:
    """The serialized model. A piece's score is minus the place of its first merge; those that no merge makes, such as
    single characters, come last."""
    model = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]
    pieces = dict.fromkeys(left + right for left, right in model["merges"])
    scores = {piece: -float(place) for place, piece in enumerate(pieces)}
    written = proto.ModelProto()
    kinds = proto.ModelProto.SentencePiece
    bytes_ = frozenset(BYTES)
    for text, _ in sorted(model["vocab"].items(), key=lambda item: int(item[1])):
        if text == "<unk>":
            kind = kinds.UNKNOWN
        elif text in CONTROL:
            kind = kinds.CONTROL
        elif text in SPECIAL:
            kind = kinds.USER_DEFINED
        elif text in bytes_:
            kind = kinds.BYTE
        elif text.startswith("<unused"):
            kind = kinds.UNUSED
        else:
            kind = kinds.NORMAL
        written.pieces.add(piece=text, score=scores.get(text, -float(len(scores))), type=kind)
    trainer, normalizer = written.trainer_spec, written.normalizer_spec
    trainer.model_type = proto.TrainerSpec.BPE
    trainer.vocab_size = len(model["vocab"])
    trainer.byte_fallback = True
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = 0, 1, 2, 3
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return bytes(written.SerializeToString())
