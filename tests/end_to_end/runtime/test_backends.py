"""Both backends on nano at f32, LiteRT with a bundle for a GPU too: the one conformance class."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from mtp_export.formats.onnx.convert import IR_VERSION, OPSET
from mtp_runtime import Session
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
def test_variants_say_the_same(usual: str, variant: str, export_nano: Export) -> None:
    """Standard operations against ONNX Runtime's own attention, caches for a GPU against those for a CPU: logits,
    drafts and rows."""
    with (
        Session.open(export_nano("f32", export_format=usual)) as first_session,
        Session.open(export_nano("f32", export_format=variant)) as second_session,
    ):
        tokens = tokens_of(first_session, 305)
        said = []
        for session in (first_session, second_session):
            start(session, tokens[:300])
            passed = session.backend.verify(tokens[300:])
            draft = session.backend.draft(7, passed.activations[-1], with_candidates=True)
            said.append((passed, draft, all_rows(session)))
        (first, first_draft, rows), (second, second_draft, _) = said
        np.testing.assert_allclose(second.logits, first.logits, atol=TOLERANCE)
        np.testing.assert_allclose(second.activations, first.activations, atol=TOLERANCE)
        np.testing.assert_allclose(second_draft.activations, first_draft.activations, atol=TOLERANCE)
        assert second_draft.best == first_draft.best
        assert_same_rows(second_session, rows)


def test_onnx_graphs_are_what_they_say(export_nano: Export) -> None:
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


def test_onnx_runtime_has_nothing_to_warn_of(export_nano: Export) -> None:
    """Loaded in a process of its own at the level of warnings."""
    script = "import sys, onnxruntime as o\nfor p in sys.argv[1:]: o.InferenceSession(p)\nprint('loaded')"
    paths = [str(path) for path in sorted(export_nano("int8", export_format="onnx").glob("*.onnx"))]
    assert len(paths) == 6  # a graph for each of the four roles, two of them for eight sequences too
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("loaded\n", "")
