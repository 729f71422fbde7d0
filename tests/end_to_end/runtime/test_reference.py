"""The exported float32 pair in each backend against transformers, on nano: logits, hidden states and cache rows.

test_models.py compares our modules; here everything after them takes part too: lowering, weights in the file, kernels,
and the runtime that cuts a text into passes and keeps the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma4AssistantForCausalLM

from mtp_export.source.embedded import EMBEDDED
from mtp_runtime import Session
from mtp_runtime.generate.backend import FloatArray
from tests.conftest import Export
from tests.support.backend_tests import tokens_of

# Float32 sums in another order differ by some 1e-5 here, where logits reach 30; one wrong term shows as 1e-2 and more.
TOLERANCE = 1e-4
# Passes after a prompt: a full verify, a shorter one, two decode steps, a full verify.
PASSES = (5, 3, 1, 1, 5)
# Within nano's sliding window of 128, and more than twice as long; neither is whole prefill passes.
LENGTHS = (41, 300)

WholePass = Callable[[tuple[int, ...]], tuple[Any, DynamicCache]]


@pytest.fixture(scope="module", params=["tflite", "onnx"])
def session(request: pytest.FixtureRequest, export_nano: Export) -> Iterator[Session]:
    with Session.open(export_nano("f32", export_format=request.param)) as opened:
        yield opened


@pytest.fixture(scope="module")
def target() -> Any:  # transformers types only half of what is used here
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "target", dtype=torch.float32, local_files_only=True)
    return model.train(False)


@pytest.fixture(scope="module")
def drafter() -> Any:
    folder = EMBEDDED / "drafter"
    return Gemma4AssistantForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).train(False)


def assert_close(actual: FloatArray, expected: torch.Tensor, name: str) -> None:
    np.testing.assert_allclose(actual, expected.numpy(), atol=TOLERANCE, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def whole_pass(target: Any) -> WholePass:
    """One pass of transformers over all tokens, done once: its logits, and its cache."""

    @functools.cache
    @torch.no_grad()
    def run(ids: tuple[int, ...]) -> tuple[Any, DynamicCache]:
        rows = DynamicCache()  # without a config it keeps the rows beyond the window too
        options = {"output_hidden_states": True, "return_shared_kv_states": True}
        return target(torch.tensor([ids]), past_key_values=rows, use_cache=True, **options), rows

    return run


@pytest.mark.parametrize("length", LENGTHS)
def test_target(session: Session, whole_pass: WholePass, length: int) -> None:
    """Prefill in passes, verify and decode, against one pass of transformers over the whole text."""
    ids = tokens_of(session, length + sum(PASSES))
    reference, rows = whole_pass(tuple(ids))
    backend = session.backend
    backend.kv_cache.rewind(0)
    backend.prefill(ids[:length])
    at = length
    for size in PASSES:
        passed = backend.verify(ids[at : at + size])
        backend.kv_cache.advance(size)
        assert_close(passed.logits, reference.logits[0, at : at + size], f"logits at {at}")
        assert_close(passed.activations, reference.hidden_states[-1][0, at : at + size], f"activations at {at}")
        at += size
    of_layers = [name for name in backend.kv_cache.names if backend.kv_cache.rows(name).shape[-1] > 1]
    assert len(of_layers) == 10  # a ring has one more, of its positions
    for name in of_layers:
        *_, part, layer = name.split("_")
        theirs: Any = rows.layers[int(layer)]  # a union in transformers, of which only one kind has rows
        assert_close(backend.kv_cache.rows(name), {"k": theirs.keys, "v": theirs.values}[part], name)


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_drafter(session: Session, target: Any, drafter: Any, whole_pass: WholePass, length: int) -> None:
    """Chained draft steps over the target's rows: the scores of every candidate, and what the next step is fed."""
    *processed, token = tokens_of(session, length + 1)
    reference, _ = whole_pass(tuple(processed))
    session.backend.kv_cache.rewind(0)
    session.backend.prefill(processed)
    theirs = reference.hidden_states[-1][:, -1:]
    ours = theirs[0, 0].numpy()
    embed = target.get_input_embeddings()
    for step in range(session.manifest.num_draft_tokens):
        expected = drafter(
            inputs_embeds=torch.cat([embed(torch.tensor([[token]])), theirs], -1),
            position_ids=torch.tensor([[length]]),
            shared_kv_states=reference.shared_kv_states,
        )
        draft = session.backend.draft(token, ours, with_candidates=True)
        assert draft.candidates is not None
        assert draft.scores is not None
        row = expected.logits[0, 0]
        if session.manifest.export_format == "tflite":  # it drafts no stop token
            row[list(session.manifest.stop_token_ids)] = row.min()
        chosen = torch.tensor(draft.candidates).long()
        others = torch.ones(len(row), dtype=torch.bool).index_fill(0, chosen, False)
        assert (row[others] == row.min()).all(), "transformers scored a token that is not our candidate"
        assert_close(draft.scores - draft.scores.max(), row[chosen] - row.max(), f"scores of step {step}")
        assert_close(draft.activations, expected.last_hidden_state[0, 0], f"activations of step {step}")
        assert draft.best == row.argmax()
        token, ours, theirs = draft.best, draft.activations, expected.last_hidden_state
