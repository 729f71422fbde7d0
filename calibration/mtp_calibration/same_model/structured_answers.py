"""Answers that should be JSON or tool calls: are those of a bundle valid where the float model's are?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtp_calibration.same_model.float_pair import FloatTarget
from mtp_calibration.same_model.observe import Text
from mtp_calibration.same_model.quality import Structured
from mtp_calibration.same_model.structured import is_valid
from mtp_export.check.prompts import Prompt
from mtp_runtime import Session


def structured_answers(
    session: Session, target: FloatTarget, prompts: Sequence[Prompt], texts: Sequence[Text]
) -> Structured:
    """Count the valid answers to prompts that ask for JSON or tool calls.

    The float model's answers are its own, with the bundle's as drafts.
    """
    pairs = [(p, t) for p, t in zip(prompts, texts, strict=True) if p.expects]
    float_valid, valid, lost = 0, 0, []
    for prompt, text in pairs:
        answers = [float_answer(session, target, text), text.ids[text.start :]]
        first, second = (
            is_valid(session.tokenizer.decode(ids, skip_special_tokens=False), prompt.expects, prompt.opened)
            for ids in answers
        )
        float_valid, valid = float_valid + first, valid + second
        if first and not second:
            lost.append(prompt.id)
    return Structured(prompts=len(pairs), float_valid=float_valid, valid=valid, lost=tuple(lost))


def float_answer(session: Session, target: FloatTarget, text: Text) -> tuple[int, ...]:
    """Return the float model's greedy answer, as long as the bundle's or shorter.

    The bundle drafts the rest of the answer. One pass of the float model keeps the leading tokens that are its own
    choices and adds one, and so on: speculative decoding with the quantised model as the drafter.
    """
    ids, end = list(text.ids), len(text.ids)
    settled = text.start
    stops, suppressed = session.manifest.stop_token_ids, list(session.manifest.suppress_tokens)
    while settled < end:
        (outputs,) = target.outputs([ids])
        logits = outputs.logits.copy()
        logits[:, suppressed] = -np.inf
        choices = logits.argmax(-1)
        while settled < len(ids) and ids[settled] == choices[settled - 1]:
            settled += 1
        if settled == len(ids):
            break
        ids = [*ids[:settled], int(choices[settled - 1])]
        settled += 1
        if ids[-1] in stops or settled >= end:
            break
        ids += session.generate(ids, max_new_tokens=end - settled).finish().tokens
    return tuple(ids[text.start :])
