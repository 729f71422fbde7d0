"""Several sequences in common passes: each says what it says alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mtp_export.bundle.litertlm import write_manifest
from mtp_export.check.prompts import heldout_prompts
from mtp_export.formats.onnx.batch import write_batched
from mtp_export.source.checkpoint import hash_file
from mtp_runtime import ContextFullError, Sampling, Session, SessionBatch, UserError, read_manifest
from mtp_runtime.bundle.contract import BATCH_ROLES, MANIFEST_NAME, batch_role
from tests.conftest import Export
from tests.support.backend_tests import BackendTests, all_rows

NEW_TOKENS = 24


@pytest.fixture(scope="module", params=["int4", "f32"])
def bundle(request: pytest.FixtureRequest, export_nano: Export) -> Path:
    return export_nano(request.param, export_format="onnx")


@pytest.fixture(scope="module")
def batch(bundle: Path) -> Iterator[SessionBatch]:
    with SessionBatch.open(bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def prompts(bundle: Path) -> list[list[int]]:
    """Of 1 to several hundred tokens: some within a window, some many windows long."""
    with Session.open(bundle, verify=False) as session:
        tokens = [session.tokenize(prompt.text) for prompt in heldout_prompts()]
    texts = [(tokens[i] * (1 + i))[: (1, 9, 40, 90, 170, 300, 520, 800, 30, 5)[i]] for i in range(10)]
    assert len({len(text) for text in texts}) == 10
    return texts


@pytest.fixture(scope="module")
def alone(bundle: Path, prompts: list[list[int]]) -> dict[int, list[tuple[int, ...]]]:
    """What each prompt's own run says, by K."""
    with Session.open(bundle, verify=False) as session:
        return {
            k: [
                session.generate(p, max_new_tokens=NEW_TOKENS, num_draft_tokens=k, stop_token_ids=()).finish().tokens
                for p in prompts
            ]
            for k in (0, 4)
        }


@pytest.mark.parametrize("num_draft_tokens", [0, 4])
def test_each_equals_its_own_run(
    batch: SessionBatch,
    prompts: list[list[int]],
    alone: dict[int, list[tuple[int, ...]]],
    num_draft_tokens: int,
) -> None:
    """Ten prompts through eight sequences, so that sequences end and begin while others are under way."""
    traces = batch.generate(prompts, max_new_tokens=NEW_TOKENS, num_draft_tokens=num_draft_tokens, stop_token_ids=())
    assert [trace.tokens for trace in traces] == alone[num_draft_tokens]


def test_depths_may_differ(
    batch: SessionBatch, prompts: list[list[int]], alone: dict[int, list[tuple[int, ...]]]
) -> None:
    """A sequence without drafts, others with one to four, in the same passes."""

    def run(i: int) -> tuple[int, ...]:
        generation = batch.sessions[i].generate(
            prompts[i], max_new_tokens=NEW_TOKENS, num_draft_tokens=i % 5, stop_token_ids=()
        )
        return generation.finish().tokens

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(run, range(8))) == alone[0][:8]


def test_sampled_sequences_do_not_see_each_other(batch: SessionBatch, prompts: list[list[int]], bundle: Path) -> None:
    sampling = Sampling(temperature=0.9, seed=7)
    traces = batch.generate(prompts[:5], max_new_tokens=NEW_TOKENS, sampling=sampling, stop_token_ids=())
    with Session.open(bundle, verify=False) as session:
        for prompt, trace in zip(prompts, traces, strict=False):
            own = session.generate(prompt, max_new_tokens=NEW_TOKENS, sampling=sampling, stop_token_ids=())
            assert trace.tokens == own.finish().tokens


def test_a_resting_sequence_keeps_its_rows(batch: SessionBatch, prompts: list[list[int]]) -> None:
    first, second = batch.sessions[:2]
    first.generate(prompts[5], max_new_tokens=5, stop_token_ids=()).finish()
    rows = all_rows(first)
    second.generate(prompts[6], max_new_tokens=NEW_TOKENS, stop_token_ids=()).finish()
    for name, values in all_rows(first).items():
        np.testing.assert_array_equal(values, rows[name])


def test_a_full_cache_is_that_sequence_s_alone(batch: SessionBatch, prompts: list[list[int]]) -> None:
    full, other = batch.sessions[:2]
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(other.generate(prompts[3], max_new_tokens=NEW_TOKENS, stop_token_ids=()).finish)
        with pytest.raises(ContextFullError):
            full.backend.prefill([5] * (batch.sessions[0].manifest.cache_length + 1))
        assert len(running.result().tokens) == NEW_TOKENS
    full.backend.kv_cache.rewind(0)


@pytest.mark.parametrize("sequences", range(2, 9))
def test_every_size_of_batch(
    bundle: Path, prompts: list[list[int]], alone: dict[int, list[tuple[int, ...]]], sequences: int, tmp_path: Path
) -> None:
    """Graphs for two to eight sequences, over the data of one export."""
    with SessionBatch.open(resized(bundle, sequences, tmp_path / "bundle")) as batch:
        assert len(batch.sessions) == sequences
        traces = batch.generate(prompts[:sequences], max_new_tokens=8, stop_token_ids=())
    assert [trace.tokens for trace in traces] == [tokens[:8] for tokens in alone[4][:sequences]]


def resized(bundle: Path, sequences: int, folder: Path) -> Path:
    """Write the bundle again, with graphs for so many sequences."""
    folder.mkdir()
    for path in bundle.iterdir():
        shutil.copyfile(path, folder / path.name)
    manifest = read_manifest(bundle)
    files = dict(manifest.files)
    for role in BATCH_ROLES:
        path = folder / files[batch_role(role)].path
        path.unlink()
        write_batched(bundle / files[role].path, manifest.signatures[role][0], sequences, path)
        files[batch_role(role)] = hash_file(path)
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, msgspec.structs.replace(manifest, batch_size=sequences, files=files))
    return folder


def test_a_bundle_for_one_sequence_says_what_to_do(export_nano: Export) -> None:
    with pytest.raises(UserError, match="export it with --format onnx --batch-size 2 to 8"):
        SessionBatch.open(export_nano("int8"))


@pytest.fixture(scope="module")
def session(export_nano: Export) -> Iterator[Session]:
    """One of eight sequences."""
    with SessionBatch.open(export_nano("f32", export_format="onnx")) as opened:
        yield opened.sessions[3]


class TestOneSequenceOfABatch(BackendTests):
    """The conformance class on a sequence whose passes have room for seven others."""
