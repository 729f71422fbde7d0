"""Suppressed tokens and the checkpoint's sampling from a checkpoint to every runtime, with MTP and without."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from litert_lm_builder.litertlm_header_schema_py_generated import AnySectionDataType
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from mtp_export.check.stock_runtime import StockRequest, run_stock
from mtp_export.config import FormatConfig
from mtp_export.export import export
from mtp_runtime import Session
from mtp_runtime.bundle import litertlm
from mtp_runtime.generate.session_batch import SessionBatch
from tests.differential.oracle import (
    PROMPT,
    TOLERANCE,
    Silent,
    export_config,
    loaded,
    nano_pair,
    nano_run,
    rewrite_json,
)

NEW_TOKENS = 12
SAMPLER = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}


class Suppressing(NamedTuple):
    """A bundle that suppresses tokens that nano would say here, what transformers generates then, and by how much the
    best of the tokens that may be said was best."""

    bundle: Path
    suppressed: frozenset[int]
    expected: tuple[int, ...]
    margins: tuple[float, ...]


@pytest.fixture(scope="module", params=["tflite", "onnx"])
def suppressing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Suppressing:
    run, output = nano_run(), tmp_path_factory.mktemp("suppressing") / "bundle"
    prompt, own = run.tokens[: run.prompt_length], run.tokens[run.prompt_length :]
    suppressed = frozenset({own[0], own[3]})
    with nano_pair() as pair:
        changes = {"suppress_tokens": [*suppressed, 99999], **SAMPLER}
        rewrite_json(pair.target / "generation_config.json", changes)
        format = FormatConfig(name=request.param, batch_size=2 if request.param == "onnx" else 1)
        export(dataclasses.replace(export_config(pair, output), format=format), Silent())
        model = loaded(pair.target)
        options: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": NEW_TOKENS}
        answer = model.generate(torch.tensor([prompt]), **options, output_scores=True, return_dict_in_generate=True)
    generated = answer.sequences[0, len(prompt) :].tolist()
    assert not suppressed & set(generated)
    best = [scores[0].topk(2).values.tolist() for scores in answer.scores]
    return Suppressing(output, suppressed, tuple(generated), tuple(first - second for first, second in best))


@pytest.mark.parametrize("drafts", [0, 1, 4])
def test_greedy_output_is_that_of_transformers(suppressing: Suppressing, drafts: int) -> None:
    with Session.open(suppressing.bundle, threads=1) as session:
        generation = session.generate(PROMPT, max_new_tokens=NEW_TOKENS, num_draft_tokens=drafts, with_margins=True)
        trace = generation.finish()
    assert trace.tokens == suppressing.expected
    assert trace.margins == pytest.approx(suppressing.margins, abs=2 * TOLERANCE)


@pytest.mark.parametrize("method", ["match", "speculative"])
def test_no_draw_gives_one(suppressing: Suppressing, method: Any) -> None:
    with Session.open(suppressing.bundle, threads=1) as session:
        for seed in range(12):
            sampling = session.checkpoint_sampling(seed=seed, method=method)
            trace = session.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=sampling).finish()
            assert not suppressing.suppressed & set(trace.tokens)


def test_the_checkpoints_sampling(suppressing: Suppressing) -> None:
    with Session.open(suppressing.bundle, threads=1) as session:
        sampling = session.checkpoint_sampling()
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (
            1.3,
            20,
            0.95,
            1.1,
        )
        drawn = [
            session.generate(PROMPT, max_new_tokens=NEW_TOKENS, num_draft_tokens=k, sampling="checkpoint")
            .finish()
            .tokens
            for k in (0, 4)
        ]
        assert (
            drawn[0]
            == drawn[1]
            == session.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=sampling).finish().tokens
        )
        assert drawn[0] != suppressing.expected


@pytest.mark.parametrize("suppressing", ["onnx"], indirect=True)
def test_a_batch_generates_no_suppressed_token(suppressing: Suppressing) -> None:
    with SessionBatch.open(suppressing.bundle, threads=1) as batch:
        for trace in batch.generate([PROMPT] * 3, max_new_tokens=NEW_TOKENS):
            assert trace.tokens == suppressing.expected


@pytest.mark.parametrize("suppressing", ["tflite"], indirect=True)
def test_the_litertlm_metadata_has_suppressed_tokens_and_sampler(suppressing: Suppressing) -> None:
    metadata = llm_metadata_pb2.LlmMetadata()
    with (suppressing.bundle / "nano.litertlm").open("rb") as file:
        section = next(s for s in litertlm.read_sections(file) if s.kind == AnySectionDataType.LlmMetadataProto)
        file.seek(section.begin)
        metadata.ParseFromString(file.read(section.end - section.begin))
    assert set(metadata.suppress_tokens.ids) == suppressing.suppressed
    sampler = metadata.sampler_params
    assert (sampler.type, sampler.k) == (sampler.TOP_P, 20)
    assert (sampler.temperature, sampler.p) == pytest.approx((1.3, 0.95))


@pytest.mark.parametrize("suppressing", ["tflite"], indirect=True)
@pytest.mark.parametrize("use_mtp", [False, True])
def test_stock_litert_lm_generates_the_expected_tokens(suppressing: Suppressing, use_mtp: bool) -> None:
    manifest = json.loads((suppressing.bundle / "manifest.json").read_text(encoding="utf-8"))
    path = suppressing.bundle / manifest["files"]["litertlm"]["path"]
    stock = run_stock(
        StockRequest(
            model_path=str(path),
            prompts=[PROMPT],
            max_new_tokens=NEW_TOKENS,
            context_length=manifest["context_length"],
            use_mtp=use_mtp,
            threads=1,
        )
    )
    with Session.open(suppressing.bundle, threads=1) as session:
        text = session.detokenize(suppressing.expected)
    assert stock.outputs[0].text.startswith(text)
