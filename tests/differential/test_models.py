"""Our static-shape modules against transformers, float32, on tiny random pairs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma4ForCausalLM

from mtp_export.graph.ir import run_signature
from mtp_export.graph.static import trace_drafter
from mtp_runtime.bundle.contract import PARAM_TENSOR, CacheName
from tests.support.tiny import (
    END_TOKEN,
    PARAMS,
    StaticTarget,
    Tiny,
    causal_mask,
    drafter_weights,
    hf_drafter,
    hf_target,
)

# Reordered float32 sums over at most a hundred terms of order one differ by some 1e-6; 1e-4 leaves no room for a
# wrong term, which shows as 1e-2 and more on these weights.
TOLERANCE = 1e-4
VARIANTS = [
    Tiny(num_kv_heads=kv, double_wide=wide, sliding_window=window)
    for kv in (1, 2)
    for wide in (False, True)
    for window in (5, 64)
]
VARIANTS += [
    Tiny(num_kv_heads=kv, sliding_window=window, single_buffer=True) for kv in (1, 2) for window in (5, 64)
]  # as for a GPU
CACHE_LENGTH = 48
# Caches of sliding layers as rings, which a text of LONG goes round: several times in a small one. Full layers read
# their caches in two steps.
RINGS = [
    Tiny(num_kv_heads=kv, sliding_window=window, ring_length=ring)
    for kv in (1, 2)
    for window, ring in ((5, 32), (64, 128))
]
LONG, LONG_CACHE = 290, 311
LONG_TOLERANCE = 2e-4  # as above, over three times the terms


def ids_of(length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tiny", VARIANTS, ids=str)
@pytest.mark.parametrize("chunks", [(24,), (7, 5, 5, 1, 1, 5), (1,) * 24], ids=str)
@torch.no_grad()
def test_target_logits_hidden_and_caches(tiny: Tiny, chunks: tuple[int, ...]) -> None:
    """However a sequence is cut into passes, each equals one pass of transformers over the whole."""
    model, ids = hf_target(tiny), ids_of(sum(chunks))
    reference = model(ids[None], use_cache=False, output_hidden_states=True)
    ours = StaticTarget(tiny, model, CACHE_LENGTH, set(chunks))
    position = 0
    for size in chunks:
        values = ours(ids[position : position + size], position)
        span = slice(position, position + size)
        torch.testing.assert_close(values["logits"][0], reference.logits[0, span], atol=TOLERANCE, rtol=0)
        hidden = reference.hidden_states[-1]
        torch.testing.assert_close(values["activations"][0], hidden[0, span], atol=TOLERANCE, rtol=0)
        position += size

    assert_caches(ours, model, ids)


@pytest.mark.parametrize("tiny", RINGS, ids=str)
@torch.no_grad()
def test_a_ring_changes_nothing(tiny: Tiny) -> None:
    """Passes over a text that is longer than the ring are those over caches of the whole to the last bit, and those of
    transformers. Of drafts that are not accepted, rows are written and overwritten."""
    model, ids = hf_target(tiny), ids_of(LONG)
    reference = model(ids[None], use_cache=False, output_hidden_states=True)
    whole = dataclasses.replace(tiny, ring_length=None)
    ours, linear = (StaticTarget(one, model, LONG_CACHE, {1, 5, 16}) for one in (tiny, whole))
    for position, size in passes_over(tiny.ring_length or 0):
        right = ids[position : position + size]
        if size == 16:
            ours(right, position, "prefill_16")
            linear(right, position, "prefill_16")
            continue
        wrong = torch.cat([right[:1], ids_of(size - 1, seed=position)])
        for tokens in (wrong, right):
            values, expected = ours(tokens, position), linear(tokens, position)
            assert all(values[name].equal(expected[name]) for name in ("logits", "activations")), position
        span = slice(position, position + size)
        torch.testing.assert_close(values["logits"][0], reference.logits[0, span], atol=LONG_TOLERANCE, rtol=0)
        hidden = reference.hidden_states[-1]
        torch.testing.assert_close(values["activations"][0], hidden[0, span], atol=LONG_TOLERANCE, rtol=0)


def passes_over(ring: int) -> Iterator[tuple[int, int]]:
    """Positions and sizes of the passes over a text: prefills of 16 tokens, over the ring's end too, verifies of 5 and
    decodes."""
    position = 0
    for size in itertools.chain([16] * 4, [5, 1, 1, 5] * 3, [16] * 6, itertools.repeat(5)):
        if size == 5 and position % ring + size > ring:
            size = 1  # a drafter holds back there
        if position + size > LONG:
            return
        yield position, size
        position += size


@pytest.mark.parametrize("tiny", RINGS, ids=str)
@torch.no_grad()
def test_a_ring_that_was_taken_back_too_far_ends_the_answer(tiny: Tiny) -> None:
    """The stop token is the best, and stays it, until the text is prefilled again."""
    ids = ids_of(LONG)
    ours, ring = StaticTarget(tiny, hf_target(tiny), LONG_CACHE, {1, 5, 16}), tiny.ring_length or 0

    def best(position: int, size: int) -> set[int]:
        return set(ours(ids[position : position + size], position)["logits"][0].argmax(-1).tolist())

    def prefill(stop: int) -> None:
        for position in range(0, stop, 16):
            ours(ids[position : position + 16], position, "prefill_16")

    prefill(160)
    kept = ring - tiny.sliding_window + 1  # of this many positions, all that their windows need is there
    assert best(160 - kept, 1) != {END_TOKEN}
    prefill(160)
    assert best(160 - kept - 1, 1) == {END_TOKEN}
    assert best(160 - kept, 5) == {END_TOKEN}
    assert best(160 - kept + 5, 1) == {END_TOKEN}
    prefill(160)
    assert best(160, 5) != {END_TOKEN}


def assert_caches(ours: StaticTarget, model: Gemma4ForCausalLM, ids: torch.Tensor) -> None:
    """Every filled row of every cache equals transformers'."""
    rows = DynamicCache()  # without a config it keeps the rows beyond the window too
    model(ids[None], past_key_values=rows, use_cache=True)
    for i in range(ours.spec.num_caches):
        layer: Any = rows.layers[i]  # a union in transformers, of which only one kind has rows
        for name, theirs in zip(CacheName.pair(i), (layer.keys, layer.values), strict=True):
            filled = ours.rows_of(name)[:, :, : len(ids)]
            torch.testing.assert_close(filled, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tiny", VARIANTS, ids=str)
@torch.no_grad()
def test_prefill_writes_the_same_caches(tiny: Tiny) -> None:
    model, ids = hf_target(tiny), ids_of(24)
    ours = StaticTarget(tiny, model, CACHE_LENGTH, {8})
    for start in range(0, 24, 8):
        ours(ids[start : start + 8], start, "prefill_8")
    assert_caches(ours, model, ids)


DRAFTED = [
    *((tiny, processed) for tiny in VARIANTS for processed in (3, 24)),  # before the window, and beyond one
    *((tiny, 288) for tiny in RINGS),
]


@pytest.mark.parametrize(("tiny", "processed"), DRAFTED, ids=str)
@torch.no_grad()
def test_drafter_chained_steps(tiny: Tiny, processed: int) -> None:
    """Four chained draft steps: scores of every candidate and the hidden state fed to the next step."""
    target, assistant, ids = hf_target(tiny), hf_drafter(tiny), ids_of(processed + 1)
    spec = tiny.drafter_spec
    out = target(ids[None, :-1], use_cache=False, output_hidden_states=True, return_shared_kv_states=True)
    length, size = (CACHE_LENGTH, processed) if tiny.ring_length is None else (LONG_CACHE, 16)
    static = StaticTarget(tiny, target, length, {size})
    for position in range(0, processed, size):
        static(ids[position : position + size], position, f"prefill_{size}")
    shape = tiny.shape(length, 4)
    graph = trace_drafter(spec, tiny.target_spec, shape, position_offset=1, row_scales=False)
    draft, weights = graph.signatures[0], drafter_weights(spec, assistant)
    caches = {t.name: static.caches[t.name] for t in draft.signature.inputs if t.is_cache}

    token, theirs = ids[-1], out.hidden_states[-1][:, -1:]
    ours = theirs
    for _ in range(4):
        embedding = target.model.embed_tokens(token.reshape(1, 1))
        reference = assistant(
            inputs_embeds=torch.cat([embedding, theirs], -1),
            position_ids=torch.tensor([[processed]]),
            shared_kv_states={k: out.shared_kv_states[k] for k in ("sliding_attention", "full_attention")},
        )
        inputs = {
            "activations": torch.cat([embedding, ours], -1),
            "input_pos": torch.tensor([processed - 1], dtype=torch.int32),
            "mask": causal_mask(length, processed - 1, 1),
            PARAM_TENSOR: PARAMS,
        }
        values = run_signature(graph, draft, weights, inputs | caches)
        row, logits = reference.logits[0, 0], values["logits"][0, 0]
        candidates = logits > 0
        assert candidates.sum() == spec.head.num_candidates
        assert (row[~candidates] == row.min()).all(), "transformers scored a token that is not our candidate"
        torch.testing.assert_close(logits - logits.max(), row - row.max(), atol=TOLERANCE, rtol=0)
        ours, theirs = values["projected_activations"], reference.last_hidden_state
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
        token = row.argmax()
