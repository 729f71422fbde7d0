"""Both backends on nano at f32, LiteRT with a bundle for a GPU too: the one conformance class."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest

from mtp_export.check.parity import own_tolerance
from mtp_export.formats.onnx.convert import IR_VERSION, OPSET
from mtp_runtime import Session
from mtp_runtime.generate.backend import FloatArray
from tests.conftest import Export
from tests.support.backend_tests import (
    TOLERANCE,
    BackendTests,
    ClosingTests,
    ConversationTests,
    all_rows,
    assert_same_rows,
    start,
    tokens_of,
)


class Decoded(NamedTuple):
    """A text, and what decoding it leaves. Shapes: tokens T, logits [T,V], rows by cache [1,G,T,D]."""

    tokens: list[int]
    logits: FloatArray
    rows: dict[str, FloatArray]


FORMATS = ("tflite", "tflite-gpu", "onnx")


@pytest.fixture(scope="module", params=FORMATS)
def bundle(request: pytest.FixtureRequest, export_nano: Export) -> Path:
    return export_nano("f32", export_format=request.param)


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    with Session.open(bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def other_session(bundle: Path) -> Iterator[Session]:
    with Session.open(bundle) as opened:
        yield opened


@pytest.fixture
def fresh_session(bundle: Path) -> Iterator[Session]:
    with Session.open(bundle) as opened:
        yield opened


class TestBackends(BackendTests):
    """LiteRT and ONNX Runtime."""


class TestConversations(ConversationTests):
    """Likewise."""


class TestClosing(ClosingTests):
    """Likewise."""


@pytest.mark.parametrize(("usual", "variant"), [("onnx", "onnx-portable"), ("tflite", "tflite-gpu")])
def test_variants_give_the_same(usual: str, variant: str, export_nano: Export) -> None:
    """Standard operations against ONNX Runtime's own attention, caches for a GPU against those for a CPU: logits,
    drafts and rows."""
    with (
        Session.open(export_nano("f32", export_format=usual)) as first_session,
        Session.open(export_nano("f32", export_format=variant)) as second_session,
    ):
        tokens = tokens_of(first_session, 305)
        results = []
        for session in (first_session, second_session):
            start(session, tokens[:300])
            passed = session.backend.verify(tokens[300:])
            draft = session.backend.draft(7, passed.activations[-1], with_candidates=True)
            results.append((passed, draft, all_rows(session)))
        (first, first_draft, rows), (second, second_draft, _) = results
        np.testing.assert_allclose(second.logits, first.logits, atol=TOLERANCE)
        np.testing.assert_allclose(second.activations, first.activations, atol=TOLERANCE)
        np.testing.assert_allclose(second_draft.activations, first_draft.activations, atol=TOLERANCE)
        assert second_draft.best == first_draft.best
        # A ring has one more, of its positions.
        of_layers = {name: rows[name] for name in second_session.backend.kv_cache.names}
        assert {values.shape[-1] for name, values in rows.items() if name not in of_layers} <= {1}
        assert_same_rows(second_session, of_layers)


@pytest.fixture(scope="module", params=["f32", "int8", "int4"])
def litert_bundle(request: pytest.FixtureRequest, export_nano: Export) -> Path:
    return export_nano(request.param)


@pytest.fixture(scope="module")
def decoded(litert_bundle: Path) -> Decoded:
    """Decode a text that is longer than the window and than every shorter `decode` reads, on one thread."""
    with Session.open(litert_bundle, threads=1) as session:
        tokens = np.random.default_rng(1).integers(100, session.manifest.vocab_size, 700).tolist()
        start(session, ())
        logits = []
        for token in tokens:
            logits.append(session.backend.verify((token,)).logits[0].copy())
            session.backend.kv_cache.advance(1)
        return Decoded(tokens, np.stack(logits), all_rows(session))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_litert_has_the_same_bits_however_a_text_is_cut_into_passes(
    litert_bundle: Path, decoded: Decoded, threads: int
) -> None:
    """Decoded, verified and prefilled, whole or in parts, on any number of threads: the same logits and cache rows
    (docs/decisions/0011). Parity's tolerance for drafts in LiteRT on a CPU is therefore 0."""
    tokens = decoded.tokens
    with Session.open(litert_bundle, threads=threads) as session:
        assert own_tolerance(session.manifest) == 0.0
        cache, verify = session.backend.kv_cache, session.backend.verify
        start(session, ())
        for size in (1, 5):
            cache.rewind(0)
            for at in range(0, len(tokens), size):
                logits = verify(tokens[at : at + size]).logits
                np.testing.assert_array_equal(logits, decoded.logits[at : at + size], f"verify of {size} at {at}")
                cache.advance(size)
            assert_same_rows(session, decoded.rows, 0.0)
        for parts in ((700,), (699, 1), (1, 699), (3, 300, 397), (127, 1, 572), (5, 123, 255, 317), (64,) * 10 + (60,)):
            cache.rewind(0)
            for size in parts:
                at = cache.filled_length
                session.backend.prefill(tokens[at : at + size])
                if at + size < len(tokens):
                    logits = verify(tokens[at + size : at + size + 1]).logits[0]
                    np.testing.assert_array_equal(logits, decoded.logits[at + size], f"{parts}, decode at {at + size}")
            assert_same_rows(session, decoded.rows, 0.0)


def test_onnx_graphs_are_valid_and_named(export_nano: Export) -> None:
    """Standard operations alone in the portable graphs, names that say where a node belongs, stated versions."""
    for variant, domains in (("onnx", {"", "com.microsoft"}), ("onnx-portable", {""})):
        for path in export_nano("f32", export_format=variant).glob("*.onnx"):
            onnx.checker.check_model(str(path), full_check=True)
            model = onnx.load(str(path), load_external_data=False)
            assert {node.domain for node in model.graph.node} <= domains
            assert (model.ir_version, model.opset_import[0].version) == (IR_VERSION, OPSET)
            names = [node.name for node in model.graph.node]
            assert len(set(names)) == len(names)
            if path.stem == "target" and variant == "onnx":
                assert "target/layers.3/attn/GroupQueryAttention" in names


def test_onnx_runtime_warns_of_nothing(export_nano: Export) -> None:
    """Loaded in a process of its own at the level of warnings."""
    script = "import sys, onnxruntime as o\nfor p in sys.argv[1:]: o.InferenceSession(p)\nprint('loaded')"
    paths = [str(path) for path in sorted(export_nano("int8", export_format="onnx").glob("*.onnx"))]
    assert len(paths) == 6  # a graph for each of the four roles, two of them for eight sequences too
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("loaded\n", "")
