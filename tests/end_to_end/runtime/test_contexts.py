"""nano opened at contexts of all lengths, and with rings for its sliding layers: the same words, to the bit."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mtp_runtime import GenerationTrace, Session, UserError
from mtp_runtime.errors import RowsLostError
from tests.conftest import Export, run_cli

LONGEST, RING, WINDOW = 4096, 512, 128
TOKENS = np.random.default_rng(7).integers(100, 4096, LONGEST).tolist()
Open = Callable[..., Session]


@pytest.fixture(scope="module")
def exported(run_folder: Path) -> Callable[[str, str], Path]:
    """Return nano with a recipe and --rings, exported once."""

    def export(recipe: str, rings: str) -> Path:
        output = run_folder / f"rings-{recipe}-{rings}"
        with (run_folder / f"rings-{recipe}-{rings}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not output.exists():
                options = ("--rings", rings, "--cache-length", str(LONGEST), "--default-context", "600")
                run_cli("export", "--model", "nano", "--recipe", recipe, *options, "--output", str(output))
        return output

    return export


@pytest.fixture(scope="module", params=["f32"])
def recipe(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(scope="module")
def plain(exported: Callable[[str, str], Path], recipe: str) -> Iterator[Session]:
    """Without rings, at the longest context."""
    with Session.open(exported(recipe, "off"), context_length=LONGEST) as session:
        yield session


@pytest.fixture(scope="module")
def ringed(exported: Callable[[str, str], Path], recipe: str) -> Iterator[Session]:
    """With rings, at the longest context."""
    with Session.open(exported(recipe, str(RING)), context_length=LONGEST) as session:
        yield session


def say(session: Session, length: int, count: int, drafts: int = 4, keep: int = 0) -> GenerationTrace:
    """Continue the first `length` tokens by `count`."""
    return session.generate(
        TOKENS[:length],
        max_new_tokens=count,
        num_draft_tokens=drafts,
        stop_token_ids=(),
        keep_length=keep,
        with_margins=True,
    ).finish()


def assert_same(actual: GenerationTrace, expected: GenerationTrace) -> None:
    assert (actual.tokens, actual.margins) == (expected.tokens, expected.margins)


@pytest.mark.parametrize("rings", ["off", str(RING)])
@pytest.mark.parametrize("context", [6, 128, 200, 256, 300, 1000, 1024, 2040, LONGEST])
def test_every_context_is_filled_to_its_last_token_with_the_same_words(
    exported: Callable[[str, str], Path], plain: Session, recipe: str, rings: str, context: int
) -> None:
    count = min(40, context - 2)
    expected = say(plain, context - count, count, drafts=0)
    with Session.open(exported(recipe, rings), context_length=context) as session:
        assert session.manifest.context_length == context
        decoded, drafted = (
            session.generate(
                TOKENS[: context - count], num_draft_tokens=drafts, stop_token_ids=(), with_margins=True
            ).finish()
            for drafts in (0, 4)
        )
    assert decoded.finish_reason == drafted.finish_reason == "context"
    assert_same(decoded, expected)
    assert_same(drafted, expected)


def test_the_default_and_the_limits_of_the_context(exported: Callable[[str, str], Path], export_nano: Export) -> None:
    path = exported("f32", "off")
    with Session.open(path) as session:
        assert (session.manifest.context_length, session.backend.kv_cache.length) == (600, 768)
    for length, message in ((5, "takes 6 to 4096: give one"), (4097, "export with a larger --cache-length")):
        with pytest.raises(UserError, match=message):
            Session.open(path, context_length=length)
    with pytest.raises(UserError, match="alone: leave the choice out"):
        Session.open(export_nano("f32", export_format="onnx"), context_length=100)


def test_run_takes_a_context(exported: Callable[[str, str], Path]) -> None:
    options = ("run", str(exported("f32", "off")), "def add(a, b):", "--json", "--context-length")
    trace = json.loads(run_cli(*options, "24").stdout)
    assert len(trace["prompt_ids"]) + len(trace["tokens"]) == 24
    done = run_cli(*options, "5000", check=False)
    assert (done.returncode, "the context is 5000, this bundle takes 6 to 4096" in done.stderr) == (2, True)


@pytest.mark.parametrize("length", [100, 380, 470, 500, *range(506, 514), 640, 1015, 1022, 1500, 2047, 3500])
def test_rings_change_no_word(plain: Session, ringed: Session, length: int) -> None:
    expected = say(plain, length, 40, drafts=0)
    for drafts in (0, 3, 4):
        trace = say(ringed, length, 40, drafts)
        assert_same(trace, expected)


@pytest.mark.parametrize("length", [90, 300, 495, 505, 700, 1020, 2600])
def test_a_session_with_rings_is_saved_and_goes_on(
    plain: Session, ringed: Session, exported: Callable[[str, str], Path], recipe: str, length: int, tmp_path: Path
) -> None:
    """Saved in the middle of a generation, and restored at another context."""
    expected = say(plain, length, 60, drafts=0)
    generation = ringed.generate(TOKENS[:length], stop_token_ids=())
    first = [next(generation).id for _ in range(13)]
    ringed.save(tmp_path / "saved")
    generation.close()
    sizes = [ringed.backend.kv_cache.rows(name).shape[2] for name in ("kv_cache_k_0", "kv_cache_k_4")]
    assert sizes[0] <= RING
    assert sizes[1] == length + 12
    with Session.open(exported(recipe, str(RING)), context_length=length + 60) as other:
        other.generate(TOKENS[1000 : 1000 + length], max_new_tokens=20, stop_token_ids=()).finish()
        other.restore(tmp_path / "saved")
        assert list(other.token_ids) == TOKENS[:length] + first
        rest = other.generate(other.token_ids, stop_token_ids=(), keep_length=len(other.token_ids) - 1).finish()
    assert (*first, *rest.tokens) == expected.tokens


@pytest.mark.parametrize("length", [400, 511, 513, 900, 1024, 3001])
def test_a_text_is_taken_back_as_far_as_the_rings_reach(plain: Session, ringed: Session, length: int) -> None:
    cache = ringed.backend.kv_cache
    for back in (1, 100, RING - WINDOW - 128, RING - WINDOW - 20, RING - WINDOW + 2, RING, 900):
        say(ringed, length, 20)
        keep = cache.filled_length - back
        if keep <= 0:
            continue
        at = min(keep, length - 1)
        if cache.keepable(at) == at:
            changed = [*TOKENS[:at], *TOKENS[2000:2010]]
            traces = [
                session.generate(
                    changed, max_new_tokens=30, stop_token_ids=(), keep_length=kept, with_margins=True
                ).finish()
                for session, kept in ((ringed, at), (plain, 0))
            ]
            assert_same(*traces)
        else:
            assert cache.filled_length - at > RING - WINDOW - 128
            with pytest.raises(RowsLostError, match="begin at 0"):
                say(ringed, length, 20, keep=at)
            assert_same(say(ringed, length, 20), say(plain, length, 20))


@pytest.mark.parametrize("rings", ["off", str(RING)])
@pytest.mark.parametrize("edge", [256, 512, 768, 1024, 1536, 2048, LONGEST - 256])
def test_a_token_has_the_same_bits_in_every_pass_at_every_edge(
    plain: Session, ringed: Session, rings: str, edge: int
) -> None:
    """Where full layers read a step more, where rings end, and a step before the longest context."""
    session = plain if rings == "off" else ringed
    backend, cache = session.backend, session.backend.kv_cache
    cache.rewind(0)
    backend.prefill(TOKENS[: edge - 6])
    verified: dict[int, list[np.ndarray]] = {}
    for position in range(edge - 6, edge + 3):
        together = backend.verify(TOKENS[position : position + 5])
        for row in range(5):
            verified.setdefault(position + row, []).append(together.logits[row])
        alone = backend.verify(TOKENS[position : position + 1]).logits[0]
        for logits in verified[position]:
            np.testing.assert_array_equal(alone, logits, f"{position}")
        cache.advance(1)


@pytest.mark.parametrize("context", [6, 300, 512, 700, 768])
def test_the_last_slots_have_the_same_bits(
    exported: Callable[[str, str], Path], ringed: Session, recipe: str, context: int
) -> None:
    """A verify whose padding is behind the end of the context, or of the ring too."""
    ringed.backend.kv_cache.rewind(0)
    start = context - 5
    ringed.backend.prefill(TOKENS[:start])
    expected = ringed.backend.verify(TOKENS[start:context])
    with Session.open(exported(recipe, str(RING)), context_length=context) as session:
        session.backend.prefill(TOKENS[:start])
        for at in range(start, context):
            logits = session.backend.verify(TOKENS[at:context]).logits
            np.testing.assert_array_equal(logits, expected.logits[at - start :])
            session.backend.kv_cache.advance(1)
        assert session.backend.kv_cache.filled_length == context
        assert session.backend.kv_cache.length - context < 256
