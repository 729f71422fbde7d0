"""Contexts that are chosen when a bundle is opened, and caches that are rings."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_runtime import Bundle, BundleError, Manifest, MtpError, Session, UserError
from mtp_runtime.backends.litert.static import StaticBackend
from mtp_runtime.bundle.consistency import check_consistency
from mtp_runtime.bundle.context import cache_places, opened_at
from mtp_runtime.bundle.contract import TensorSpec
from mtp_runtime.errors import RowsLostError
from mtp_runtime.generate.kv_cache import Rings, StaticKVCache
from mtp_runtime.generate.loop import GenerationLoop, Request
from mtp_runtime.generate.stats import GenerationStats
from mtp_runtime.measure.teacher_forcing import FixedText, read_fixed
from mtp_runtime.text.conversation import Conversation
from tests.support import talking
from tests.support.fake_backend import VOCAB, FakeBackend, _Memory, continuation, fake_manifest

RING = 32


def exported(*, ring_length: int = RING) -> Manifest:
    return fake_manifest(cache_length=521, longest_context_length=300, ring_length=ring_length)


def test_a_chosen_context_stands_everywhere() -> None:
    check_consistency(exported())
    opened = opened_at(exported(), 12)
    assert (opened.cache_length, opened.context_length) == (256, 12)
    tensors = {t.name: t.shape for t in opened.signature("target", "decode").inputs}
    assert tensors["mask"] == (1, 1, 1, 256)
    assert (tensors["kv_cache_k_0"], tensors["kv_cache_k_1"]) == ((1, 1, 256, 1), (1, 1, RING, 1))
    assert (opened_at(exported()).cache_length, opened_at(exported()).context_length) == (512, 300)
    long = fake_manifest(cache_length=1031, longest_context_length=1024, prefill=(8, 300))
    assert [opened_at(long, n).cache_length for n in (256, 257, 1024)] == [256, 512, 1024]
    assert [spec.name for spec in opened_at(long, 256).signatures["target"]] == ["prefill_8", "decode", "verify"]
    assert [spec.name for spec in opened_at(long, 257).signatures["target"]][:2] == ["prefill_8", "prefill_300"]


@given(context=st.integers(6, 300))
def test_no_cache_is_longer_than_exported(context: int) -> None:
    """LiteRT's buffers for outputs have the size of the export: a longer cache would be written behind their end."""
    manifest = exported()
    assert context <= opened_at(manifest, context).cache_length < manifest.cache_length


@pytest.mark.parametrize(
    ("manifest", "length", "message"),
    [
        (exported(), 5, "the context is 5, this bundle takes 6 to 300: give one of these"),
        (exported(), 301, "this bundle takes 6 to 300: give one of these, or export with a larger"),
        (fake_manifest(), 61, "the context is 61, this bundle has one of 60 alone"),
    ],
)
def test_a_context_that_a_bundle_cannot_have_is_refused(manifest: Manifest, length: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        opened_at(manifest, length)
    assert message in str(caught.value)


def test_the_only_context_of_a_bundle_may_be_stated() -> None:
    assert opened_at(fake_manifest(), 60).cache_length == 64
    assert [s.name for s in opened_at(fake_manifest()).signatures["drafter"]] == ["draft"]


def with_values(manifest: Manifest, shape: tuple[int, ...], keys: tuple[int, ...]) -> Manifest:
    """Return `manifest` with other keys in its first cache, and with values."""

    def changed(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        values = TensorSpec(name="kv_cache_v_0", shape=shape, dtype="float32")
        parts = (
            (msgspec.structs.replace(t, shape=keys), values) if t.name == "kv_cache_k_0" else (t,) for t in tensors
        )
        return tuple(tensor for part in parts for tensor in part)

    signatures = {
        role: tuple(
            msgspec.structs.replace(spec, inputs=changed(spec.inputs), outputs=changed(spec.outputs)) for spec in specs
        )
        for role, specs in manifest.signatures.items()
    }
    return msgspec.structs.replace(manifest, signatures=signatures)


def test_where_values_have_their_slots_is_seen_in_the_exported_shapes() -> None:
    swapped = with_values(exported(), (1, 1, 12, 521), (1, 1, 521, 12))
    check_consistency(swapped)
    assert cache_places(swapped)["kv_cache_v_0"].slot_axis == 3
    straight = with_values(exported(), (1, 1, 521, 12), (1, 1, 521, 12))
    check_consistency(straight)
    assert cache_places(straight)["kv_cache_v_0"].slot_axis == 2
    assert [name for name, place in cache_places(straight).items() if place.is_ring] == ["kv_cache_k_1", "kv_cache_k_2"]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (with_values(exported(), (1, 1, 13, 521), (1, 1, 521, 12)), "kv_cache_v_0 is (1, 1, 13, 521), expected"),
        (with_values(fake_manifest(), (1, 1, 12, 64), (1, 1, 64, 12)), "kv_cache_v_0 is (1, 1, 12, 64), expected"),
        (msgspec.structs.replace(exported(), ring_length=31), "kv_cache_k_1 is (1, 1, 32, 1), expected (1, G, 521, D)"),
        (msgspec.structs.replace(exported(ring_length=0), ring_length=8), "kv_cache_k_0 is not the positions"),
        (msgspec.structs.replace(fake_manifest(), format_version=2), "is a variant, expected"),
    ],
)
def test_caches_that_contradict_the_manifest_are_refused(manifest: Manifest, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        check_consistency(manifest)
    assert message in str(caught.value)


def ask(prompt: list[int], drafts: int, count: int | None = None, keep: int = 0) -> Request:
    return Request(
        prompt_ids=tuple(prompt),
        max_new_tokens=count,
        num_draft_tokens=drafts,
        stop_token_ids=frozenset(),
        keep_length=keep,
    )


class Opened:
    """The fake backend at a context, and a loop."""

    def __init__(self, context: int, pattern: list[bool], *, ring_length: int = RING) -> None:
        self.manifest = opened_at(exported(ring_length=ring_length), context)
        graphs = FakeBackend(self.manifest, lambda position: pattern[position % len(pattern)])
        self.backend = StaticBackend(graphs, self.manifest)
        self.loop = GenerationLoop(self.backend, self.manifest)

    def ids(self, request: Request) -> list[int]:
        return [token.id for token in self.loop.generate(request, GenerationStats())]


@settings(deadline=None, max_examples=60)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=90),
    context=st.one_of(st.integers(6, 200), st.integers(250, 256)),
    drafts=st.integers(0, 4),
    pattern=st.lists(st.booleans(), min_size=1, max_size=12),
    ring_length=st.sampled_from([0, RING]),
)
def test_every_context_is_filled_to_its_last_token(
    prompt: list[int], context: int, drafts: int, pattern: list[bool], ring_length: int
) -> None:
    prompt = prompt[: context - 1]
    opened = Opened(context, pattern, ring_length=ring_length)
    assert opened.ids(ask(prompt, drafts)) == continuation(prompt, context - len(prompt))


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.tuples(st.integers(1, 120), st.integers(0, 60)),
    back=st.integers(0, 180),
    drafts=st.integers(0, 4),
    pattern=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_a_text_is_taken_back_rightly_or_not_at_all(
    lengths: tuple[int, int], back: int, drafts: int, pattern: list[bool]
) -> None:
    prompt = [2 + i * i % 40 for i in range(lengths[0])]
    opened = Opened(200, pattern)
    opened.ids(ask(prompt, drafts, 1 + lengths[1]))
    keep = max(opened.backend.kv_cache.filled_length - back, 0)
    changed = [*opened.loop.token_ids[:keep], 7, 9, 11]
    if opened.backend.kv_cache.keepable(keep) == keep:
        assert opened.ids(ask(changed, drafts, 20, keep)) == continuation(changed, 20)
        return
    assert back > RING - 8 - 16  # what is kept, less the window, less the padding of a prefill
    with pytest.raises(RowsLostError, match="begin at 0"):
        opened.ids(ask(changed, drafts, 20, keep))
    assert opened.ids(ask(changed, drafts, 20)) == continuation(changed, 20)


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 150), drafts=st.integers(0, 4), more=st.integers(1, 40))
def test_rows_of_rings_are_restored_to_their_slots(length: int, drafts: int, more: int) -> None:
    prompt = [2 + i * i % 40 for i in range(length)]
    first, other = Opened(200, [True, False, True]), Opened(180, [False, True])
    first.ids(ask(prompt, drafts, min(more, 160 - length + 1)))
    cache, ids = first.backend.kv_cache, list(first.loop.token_ids)
    rows = {name: cache.rows(name) for name in cache.names}
    assert rows["kv_cache_k_1"].shape[2] <= RING
    other.ids(ask([5] * 60, 4, 40))
    other.loop.restore(ids, rows)
    again = {name: other.backend.kv_cache.rows(name) for name in cache.names}
    assert all(np.array_equal(again[name], rows[name]) for name in rows)
    assert other.ids(ask(ids, drafts, 15, len(ids) - 1)) == continuation(ids, 15)


def test_rows_of_rings_that_do_not_do_are_refused() -> None:
    cache = Opened(200, [True]).backend.kv_cache
    rows = {name: np.zeros((1, 1, 100 if name == "kv_cache_k_0" else 7, 1), np.float32) for name in cache.names}
    with pytest.raises(MtpError, match="7 rows of sliding layers do not do for 100 tokens"):
        cache.restore(rows)


@pytest.mark.parametrize("filled", [0, 29, 30, 31, 32, 60])
def test_a_pass_over_the_end_of_a_ring_is_made_in_two(filled: int) -> None:
    ids = continuation([2], filled + 5)
    text = FixedText(prompt_ids=(2, *ids[:filled]), tokens=tuple(ids[filled:]))
    opened = Opened(200, [True])
    assert list(read_fixed(opened.backend, opened.manifest, text).choices) == ids[filled:]


def test_a_conversation_begins_anew_where_its_beginning_is_lost(tmp_path: Path) -> None:
    open_session = talking.fake_opener(
        tmp_path, lambda position: True, cache_length=257, longest_context_length=200, ring_length=RING
    )
    session, fresh = open_session(), open_session()
    conversation = Conversation(session)
    conversation.say("abc", max_new_tokens=3, stop_token_ids=()).finish()
    conversation.say("def ghi jkl mno", max_new_tokens=60, stop_token_ids=()).finish()
    conversation.rewind(1)
    reply = conversation.say("xyz", max_new_tokens=9, stop_token_ids=())
    assert (
        reply.finish().tokens == fresh.generate(reply.prompt_ids, max_new_tokens=9, stop_token_ids=()).finish().tokens
    )
    assert reply.stats.reused_tokens == 0
    near = conversation.say("k", max_new_tokens=9, stop_token_ids=())
    near.finish()
    assert near.stats.reused_tokens > 20


def test_a_session_that_is_too_long_for_the_context_says_so(tmp_path: Path) -> None:
    open_session = talking.fake_opener(tmp_path, lambda position: True, cache_length=257, longest_context_length=200)
    session = open_session()
    session.generate([2] * 150, max_new_tokens=2, stop_token_ids=()).finish()
    session.save(tmp_path / "saved")
    bundle = Bundle(session.bundle.exported, tmp_path, None, 60)
    short = Session(bundle, StaticBackend(FakeBackend(bundle.manifest), bundle.manifest))
    with pytest.raises(UserError, match="has 152 tokens, this session takes 60: open the bundle with"):
        short.restore(tmp_path / "saved")


def test_going_back_is_refused_before_anything_changes() -> None:
    spec = TensorSpec(name="kv_cache_k_0", shape=(1, 1, 16, 1), dtype="float32")
    cache = StaticKVCache([spec], {spec.name: _Memory(16)}, 64, rings=Rings(frozenset({spec.name}), 16, 4))
    for end in range(1, 41):
        cache.mark_written(end)
        cache.advance(1)
    assert [n for n in range(41) if cache.keepable(n) == n] == [0, *range(28, 41)]
    with pytest.raises(RowsLostError):
        cache.rewind(27)
    assert cache.filled_length == 40
    cache.rewind(28)
    assert cache.pass_room == 4  # to slot 16
    cache.rewind(0)
