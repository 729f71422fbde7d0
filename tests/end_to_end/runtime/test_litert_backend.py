"""The LiteRT backend on a real bundle: the toy pair."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mtp_runtime import BackendError, BundleError, Session, UserError
from mtp_runtime.backends.litert.backend import LiteRTCacheBuffer
from tests.support import toy_pair
from tests.support.static_graph_tests import StaticGraphTests, graphs_of
from tests.support.toy_prompt import TOY_PROMPT

# The toy pair's signatures, and one that its graph lacks.
ONE_MORE = {
    **toy_pair.SIGNATURES,
    "target": (*toy_pair.TARGET_SIGNATURES, toy_pair.MODEL.target("prefill_4", "prefill", 4, toy_pair.CACHE_LENGTH)),
}
Build = Callable[[Sequence[int]], Path]


@pytest.fixture(scope="module")
def session(toy_folder: Path) -> Iterator[Session]:
    with Session.open(toy_folder) as opened:
        yield opened


class TestLiteRT(StaticGraphTests):
    """LiteRT passes what all static graphs pass."""

    def test_every_signature_binds_the_same_buffer_object_for_a_cache(self, session: Session) -> None:
        backend = graphs_of(session)
        bindings = 0
        for role in ("target", "drafter"):
            for spec in session.manifest.signatures[role]:
                for tensor in (*spec.inputs, *spec.outputs):
                    if tensor.is_cache:
                        memory = backend.kv_cache.buffer(tensor.name)
                        assert isinstance(memory, LiteRTCacheBuffer)
                        as_input, as_output = backend.bound(role, spec.name).binds(tensor.name)
                        assert as_input is memory.buffer
                        assert as_output is (memory.buffer if role == "target" else None)
                        bindings += 1
        # Four caches in and out of four target signatures, two into the drafter; variants of format version 1 are left.
        assert bindings == 4 * 2 * 4 + 2


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_a_drafter_that_is_nearly_always_wrong_changes_nothing(
    session: Session, toy_plain: tuple[int, ...], drafts: int
) -> None:
    trace = session.generate(TOY_PROMPT, num_draft_tokens=drafts, stop_token_ids=()).finish()
    assert trace.tokens == toy_plain
    assert trace.finish_reason == "context"
    assert len(TOY_PROMPT) + len(trace.tokens) == session.manifest.context_length


@pytest.fixture(scope="module")
def oracle(toy_with_drafter: Build, toy_plain: tuple[int, ...]) -> Iterator[Session]:
    table = [*TOY_PROMPT, *toy_plain]
    with Session.open(toy_with_drafter([*table, *[0] * (80 - len(table))])) as opened:
        yield opened


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_a_drafter_that_equals_the_target_is_accepted_whole(
    oracle: Session, toy_plain: tuple[int, ...], drafts: int
) -> None:
    count = 1 + 4 * (drafts + 1)
    trace = oracle.generate(TOY_PROMPT, num_draft_tokens=drafts, stop_token_ids=(), max_new_tokens=count).finish()
    assert trace.tokens == toy_plain[:count]
    assert trace.origins == ("plain", *4 * (*drafts * ("accepted",), "bonus"))
    assert trace.stats.committed_per_round == drafts + 1


def test_an_oracle_reaches_the_last_slot_of_the_context(oracle: Session, toy_plain: tuple[int, ...]) -> None:
    trace = oracle.generate(TOY_PROMPT, stop_token_ids=()).finish()
    assert trace.tokens == toy_plain
    assert oracle.backend.kv_cache.filled_length == oracle.manifest.context_length - 1


def test_a_stop_id_in_the_middle_of_a_round_ends_it(oracle: Session, toy_plain: tuple[int, ...]) -> None:
    stop = toy_plain[3]
    trace = oracle.generate(TOY_PROMPT, stop_token_ids=[stop]).finish()
    assert trace.tokens == toy_plain[: toy_plain.index(stop) + 1]
    assert (trace.finish_reason, trace.origins[-1]) == ("stop", "accepted")


@pytest.mark.parametrize("seen", [1, 3, 4, 6, 9])
def test_rewind_then_continue_equals_an_uninterrupted_run(
    oracle: Session, toy_plain: tuple[int, ...], seen: int
) -> None:
    generation = oracle.generate(TOY_PROMPT, stop_token_ids=())
    first = [next(generation).id for _ in range(seen)]
    generation.close()
    kept = len(TOY_PROMPT) + seen - 1
    rest = oracle.generate([*TOY_PROMPT, *first], stop_token_ids=(), keep_length=kept).finish()
    assert (*first, *rest.tokens) == toy_plain


def test_margins_are_recorded_on_request(session: Session) -> None:
    plain = session.generate(TOY_PROMPT, max_new_tokens=9, num_draft_tokens=0, with_margins=True).finish()
    drafted = session.generate(TOY_PROMPT, max_new_tokens=9, with_margins=True).finish()
    assert len(plain.margins) == len(plain.tokens)
    assert plain.margins == pytest.approx(drafted.margins, abs=1e-4)
    assert session.generate(TOY_PROMPT, max_new_tokens=2).finish().margins == ()


def test_a_closed_session_refuses_to_generate(toy_folder: Path) -> None:
    session = Session.open(toy_folder)
    running = session.generate(TOY_PROMPT)
    next(running)
    decode = graphs_of(session).bound("target", "decode")
    session.close()
    session.close()
    with pytest.raises(BackendError, match="decode cannot run: its bundle is closed"):
        decode.run()
    with pytest.raises(BackendError, match="cannot bind verify: the bundle is closed"):
        graphs_of(session).bound("target", "verify")
    with pytest.raises(UserError, match="the session was closed"):
        list(running)
    with pytest.raises(UserError, match="the session is closed"):
        session.generate(TOY_PROMPT)


def printed(code: str, bundle: Path) -> tuple[str, str]:
    """Return what code prints and what it writes as errors in a process of its own, with a bundle as its argument."""
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_the_library_prints_nothing(toy_folder: Path) -> None:
    code = (
        "import sys; from mtp_runtime import Session\n"
        "with Session.open(sys.argv[1]) as session:\n"
        "    print(len(session.generate([2, 5], max_new_tokens=5, stop_token_ids=()).finish().tokens))\n"
        "print('seen', file=sys.stderr)\n"
    )
    assert printed(code, toy_folder) == ("5\n", "seen\n")


@pytest.mark.parametrize("fault", ["no graph", "other signature"])
def test_the_library_prints_nothing_when_a_bundle_is_refused(toy_folder: Path, tmp_path: Path, fault: str) -> None:
    edited(toy_folder, tmp_path, signatures=ONE_MORE)
    if fault == "no graph":
        (tmp_path / "drafter.tflite").write_bytes(b"not a graph at all" * 9)
        toy_pair.write_manifest(tmp_path)
    code = (
        "import gc, sys; from mtp_runtime import MtpError, Session\n"
        "try: Session.open(sys.argv[1])\n"
        "except MtpError as error: print(error, file=sys.stderr)\n"
        "gc.collect()\n"
    )
    _, errors = printed(code, tmp_path)
    assert errors.startswith(("LiteRT refuses the bundle: ", "the target graph has no signature"))
    assert errors.count("\n") == 1


def edited(folder: Path, tmp_path: Path, **changes: object) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    toy_pair.write_manifest(tmp_path, **changes)
    return tmp_path


def test_a_manifest_that_contradicts_its_graph_is_refused(toy_folder: Path, tmp_path: Path) -> None:
    """The manifest agrees with itself about 65 tokens; the graph has 64."""
    document = json.loads(toy_pair.write_manifest(edited(toy_folder, tmp_path), vocab_size=65).to_json())
    for spec in (*document["signatures"]["target"], *document["signatures"]["drafter"]):
        for tensor in spec["outputs"]:
            if tensor["name"] == "logits":
                tensor["shape"][-1] = 65
    (tmp_path / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match=r"target decode: logits is .*64.* in the graph and .*65.* in the manifest"):
        Session.open(tmp_path)


def test_a_signature_that_the_graph_lacks_is_refused(toy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="the target graph has no signature 'prefill_4'"):
        Session.open(edited(toy_folder, tmp_path, signatures=ONE_MORE))


@pytest.mark.parametrize("content", [b"", b"TFL3", b"\x1c\0\0\0TFL3" + bytes(64), b"not a graph at all" * 9])
def test_a_file_that_is_no_graph_is_refused(toy_folder: Path, tmp_path: Path, content: bytes) -> None:
    edited(toy_folder, tmp_path)
    (tmp_path / "drafter.tflite").write_bytes(content)
    toy_pair.write_manifest(tmp_path)
    with pytest.raises(BackendError, match="LiteRT refuses") as caught:
        Session.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_threads_must_be_positive(toy_folder: Path) -> None:
    with pytest.raises(UserError, match="threads is 0"):
        Session.open(toy_folder, threads=0)


def test_a_tflite_bundle_names_the_format_that_it_takes(toy_talking: Path) -> None:
    with pytest.raises(UserError, match="--format onnx"):
        Session.open(toy_talking, verify=False, provider="webgpu")
