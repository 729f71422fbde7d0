"""What static graphs must pass: subclass `StaticGraphTests`, and give it a fixture `session` over the toy bundle.

The expectations are computed here in numpy from the definition, not by another backend.
"""

from __future__ import annotations

import numpy as np
import pytest

from mtp_runtime import BackendError, BundleError, Session
from mtp_runtime.backends.litert.backend import LiteRTGraphs
from mtp_runtime.backends.litert.masks import CausalMask
from mtp_runtime.backends.litert.static import BoundSignature, StaticBackend
from mtp_runtime.generate.backend import FloatArray
from tests.support.toy_prompt import TOY_PROMPT

S, HIDDEN, HEAD = 64, 32, 16
# Passes over one and over several tokens use other kernels: they differed by up to 3e-5 in logits of up to 8, and a
# wrong row or mask differs by more than 1e-2.
TOLERANCE = 2e-4


def graphs_of(session: Session) -> LiteRTGraphs:
    assert isinstance(session.backend, StaticBackend)
    assert isinstance(session.backend.graphs, LiteRTGraphs)
    return session.backend.graphs


def embed(session: Session, tokens: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
    """Return the embeddings and per-layer embeddings of `tokens`. Shapes: [1, T, H], [1, T, L, P]."""
    embeddings = []
    for role in ("embedder", "per_layer_embedder"):
        bound = graphs_of(session).bound(role, "embed")
        rows = []
        for token in tokens:
            bound.write("token_ids", np.array([[token]], np.int32))
            bound.run()
            rows.append(bound.read("embeddings"))
        embeddings.append(np.concatenate(rows, 1))
    return embeddings[0], embeddings[1]


def run_target(session: Session, name: str, tokens: tuple[int, ...], position: int) -> BoundSignature:
    """Run the target's signature `name` over `tokens`, exactly as many as it takes."""
    bound = graphs_of(session).bound("target", name)
    embeddings, per_layer = embed(session, tokens)
    bound.write("embeddings", embeddings)
    bound.write("per_layer_embeddings", per_layer)
    bound.write("input_pos", np.arange(position, position + len(tokens), dtype=np.int32))
    bound.write("mask", CausalMask(S).visible(position + 1, len(tokens)))
    bound.run()
    return bound


def run_drafter(session: Session, visible: FloatArray) -> BoundSignature:
    """Run one draft pass that sees exactly the cache positions where `visible` is 0. Shapes: visible [S]."""
    bound = graphs_of(session).bound("drafter", "draft")
    bound.write("activations", np.zeros((1, 1, 2 * HIDDEN), np.float32))
    bound.write("input_pos", np.zeros(1, np.int32))
    bound.write("mask", visible)
    bound.run()
    return bound


def only(position: int) -> FloatArray:
    """Return a mask that shows one position."""
    mask = np.full(S, -1e9, np.float32)
    mask[position] = 0.0
    return mask


class StaticGraphTests:
    """One cache, shared and in place; every pass equals its one-token equivalent."""

    def test_the_cache_starts_as_zeros(self, session: Session) -> None:
        graphs_of(session).kv_cache.clear()
        for name in graphs_of(session).kv_cache.names:
            assert not graphs_of(session).kv_cache.buffer(name).read().any()

    def test_a_row_that_the_target_writes_is_seen_by_the_drafter(self, session: Session) -> None:
        graphs_of(session).kv_cache.clear()
        run_target(session, "decode", (5,), 3)
        cache = graphs_of(session).kv_cache
        rows = [cache.buffer(f"kv_cache_{kind}_1").read().reshape(S, HEAD)[3] for kind in ("k", "v")]
        assert np.abs(rows[0]).max() > 0.01
        seen = run_drafter(session, only(3)).read("projected_activations")[0, 0]
        # The toy drafter reports what it attends to, a counter in place of the first number.
        np.testing.assert_allclose(seen[1:], np.concatenate(rows)[1:], atol=1e-6)

    def test_a_row_written_into_the_cache_is_seen_by_drafter_and_target(self, session: Session) -> None:
        cache = graphs_of(session).kv_cache
        cache.clear()
        before = run_target(session, "decode", (5,), 4).read("logits")
        row = np.zeros((S, HEAD), np.float32)
        row[2] = np.linspace(-1.0, 1.0, HEAD)
        cache.buffer("kv_cache_v_1").write(row)
        seen = run_drafter(session, only(2)).read("projected_activations")[0, 0]
        np.testing.assert_allclose(seen[HEAD:], row[2], atol=1e-6)
        assert np.abs(run_target(session, "decode", (5,), 4).read("logits") - before).max() > 1e-3

    def test_a_pass_writes_its_own_rows_and_no_other(self, session: Session) -> None:
        cache = graphs_of(session).kv_cache
        cache.clear()
        marked = np.full((S, HEAD), 7.0, np.float32)
        for name in cache.names:
            cache.buffer(name).write(marked)
        run_target(session, "verify", (5, 6, 7, 8, 9), 11)
        for name in cache.names:
            changed = (cache.buffer(name).read().reshape(S, HEAD) != 7.0).any(-1)
            assert np.flatnonzero(changed).tolist() == [11, 12, 13, 14, 15]

    def test_verify_equals_one_token_at_a_time(self, session: Session) -> None:
        tokens = TOY_PROMPT[:10]
        for at, token in enumerate(tokens[:5]):
            run_target(session, "decode", (token,), at)
        one_by_one = []
        for at, token in enumerate(tokens[5:], 5):
            bound = run_target(session, "decode", (token,), at)
            one_by_one.append((bound.read("logits")[0, 0], bound.read("activations")[0, 0]))
        rows = {key: graphs_of(session).kv_cache.buffer(key).read() for key in graphs_of(session).kv_cache.names}
        bound = run_target(session, "verify", tokens[5:], 5)
        for row, (logits, activations) in enumerate(one_by_one):
            np.testing.assert_allclose(bound.read("logits")[0, row], logits, atol=TOLERANCE)
            np.testing.assert_allclose(bound.read("activations")[0, row], activations, atol=TOLERANCE)
        for key, values in rows.items():
            np.testing.assert_allclose(graphs_of(session).kv_cache.buffer(key).read(), values, atol=TOLERANCE)

    def test_prefill_leaves_the_rows_that_decode_would(self, session: Session) -> None:
        tokens = TOY_PROMPT[:8]
        cache = graphs_of(session).kv_cache
        cache.clear()
        for at, token in enumerate(tokens):
            run_target(session, "decode", (token,), at)
        expected = {key: cache.buffer(key).read() for key in cache.names}
        cache.clear()
        run_target(session, "prefill_8", tokens, 0)
        for key, values in expected.items():
            np.testing.assert_allclose(cache.buffer(key).read(), values, atol=TOLERANCE)

    def test_reading_an_output_gives_a_copy(self, session: Session) -> None:
        bound = run_target(session, "decode", (5,), 0)
        first = bound.read("logits")
        kept = first.copy()
        run_target(session, "decode", (6,), 0)
        np.testing.assert_array_equal(first, kept)
        assert np.abs(bound.read("logits") - kept).max() > 1e-3

    def test_every_signature_runs_before_anything_is_written(self, session: Session) -> None:
        for role, specs in session.manifest.signatures.items():
            for spec in specs:
                graphs_of(session).bound(role, spec.name).run()

    def test_a_signature_is_bound_once(self, session: Session) -> None:
        assert graphs_of(session).bound("target", "decode") is graphs_of(session).bound("target", "decode")

    def test_an_unknown_signature_is_an_error(self, session: Session) -> None:
        with pytest.raises(BundleError, match="target has no signature 'prefill_99'"):
            graphs_of(session).bound("target", "prefill_99")

    def test_an_input_of_the_wrong_size_is_an_error(self, session: Session) -> None:
        with pytest.raises(BackendError, match="decode: mask takes 64 values, got 63"):
            graphs_of(session).bound("target", "decode").write("mask", np.zeros(63, np.float32))
