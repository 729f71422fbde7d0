"""What is chosen of a drafter, from accepted drafts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtp_calibration.choose.head import TopKRow, enough, float_answers, position_test, top_ks
from mtp_calibration.choose.refinement import rounded_by_gptq, with_measured, within_size
from mtp_export.check.reference import greedy
from mtp_export.cli.export import command, config_of
from mtp_export.config import ExportConfig
from mtp_export.formats.format import format_of
from mtp_export.formats.sizes import litertlm_bytes
from mtp_export.pair_graphs import Settings, trace_pair
from mtp_export.refinement import WeightsRequest
from mtp_export.source.pair import open_pair
from mtp_export.source.texts import text_sizes
from mtp_export.weights.parameter import Parameter
from mtp_runtime.errors import UserError
from tests.support.tiny_files import MODELS, pair_arguments, tiny_model


def test_the_fewest_clusters_that_keep_almost_all_drafts() -> None:
    curve = [
        TopKRow(top_k=k, scored=k / 8, recall=1.0, target_recall=1.0, accepted_per_round=accepted)
        for k, accepted in ((1, 2.0), (2, 2.98), (4, 2.986), (8, 3.0))
    ]
    assert enough(curve) == 4  # 99.5 % of 3.0 are 2.985
    assert enough(curve[:2]) == 2


@pytest.mark.parametrize(
    ("before", "at", "default", "chosen"),
    [
        ([1, 1, 2, 1] * 30, [2, 3, 3, 2] * 30, 0, 1),  # clearly better at L
        ([2, 3, 3, 2] * 30, [1, 1, 2, 1] * 30, 1, 0),
        ([1, 2, 1, 2] * 30, [2, 1, 1, 2] * 30, 1, 1),  # no difference: the default stays
        ([1, 2, 1, 2] * 30, [2, 1, 1, 2] * 30, 0, 0),
    ],
)
def test_a_position_convention_is_chosen_only_if_it_is_clearly_better(
    before: list[int], at: list[int], default: int, chosen: int
) -> None:
    rounds: Any = SimpleNamespace(
        drafter=SimpleNamespace(spec=SimpleNamespace(head=SimpleNamespace(top_k=4))),
        accepted=lambda top_k, offset: (before, at)[offset],
    )
    assert position_test(rounds, default).chosen == chosen


class Stages:
    """The stages that an export tells of."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}

    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None:
        self.done[stage] = 0

    def advance(self, done: int, name: str = "") -> None:
        self.done[list(self.done)[-1]] += done


@pytest.fixture
def config_with(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExportConfig]:
    """An export of the tiny pair with options and two prompts."""
    monkeypatch.setitem(MODELS, "tiny", tiny_model(tiny))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "def add w3 w9"}\n{"text": "add w5"}\n')

    def of(*options: str) -> ExportConfig:
        arguments = [*pair_arguments(tiny), "--output", str(tmp_path / "out"), "--prompts", str(prompts), *options]
        params = command.make_context("export", arguments).params
        return config_of({n: v for n, v in params.items() if n not in ("dry_run", "resume", "as_json", "debug")})

    return of


def test_settings_of_the_drafter_are_measured(config_with: Callable[..., ExportConfig]) -> None:
    """Along what transformers' own target would say."""
    config = config_with("--drafter-position-offset", "auto", "--centroid-top-k", "auto")
    assert config.refinement.measured == ("drafter_position_offset", "centroid_top_k")
    pair = open_pair(config.source)
    texts = [[2, 30, 40, 50], [2, 31]]
    answers = [list(text.ids) for text in float_answers(pair, texts, 12)]
    own = [ids[len(text) :] for ids, text in zip(answers, texts, strict=True)]
    assert [len(ids) for ids in own] == [12, 12]
    assert greedy(pair.target.folder, texts, own) == own
    settled = with_measured(Settings(config=config, pair=pair), Stages())
    measured = settled.pair
    assert settled.config.graph.drafter_position_offset in (0, 1)
    assert measured.drafter_spec.head.top_k in top_ks(16)
    assert dataclasses.replace(measured.drafter_spec, head=pair.drafter_spec.head) == pair.drafter_spec


def test_a_size_and_a_rounding_are_kept(config_with: Callable[..., ExportConfig], tmp_path: Path) -> None:
    config = config_with("--max-size", "0.4MB", "--rounding", "gptq")
    pair, format = open_pair(config.source), format_of(config.format)
    traced = trace_pair(Settings(config=config, pair=pair), format)
    request = WeightsRequest(traced=traced, format=format, folder=tmp_path, written=frozenset())

    def file_bytes(values: Mapping[str, Mapping[str, Parameter]]) -> int:
        return sum(format.file_sizes(traced.graphs, values).values())

    # Half way between all at 8 and all at 4 bits; the sections and texts of a container come on top.
    tokenizer_bytes = text_sizes(pair.target)["tokenizer"]
    most = litertlm_bytes(format.file_sizes(traced.graphs, traced.values), tokenizer_bytes, 64 << 10) - 20_000
    sized = within_size(request, most, Stages())
    mixed = sized.values
    assert set(sized.bits.values()) <= {2, 4, 8}
    assert file_bytes(mixed) <= file_bytes(traced.values) - 20_000
    stages = Stages()
    rounded = rounded_by_gptq(request, mixed, stages)
    assert stages.done["rounding matrices"] > 0
    matrix = rounded["target"]["layers.1.mlp.down_proj.weight"]
    assert matrix.stored
    assert matrix.format == mixed["target"]["layers.1.mlp.down_proj.weight"].format
    assert file_bytes(rounded) == file_bytes(mixed)
    assert not rounded["target"]["embed_tokens.weight"].stored, "the head keeps the nearest values"
    with pytest.raises(UserError, match="the smallest mixed recipe takes"):
        within_size(request, 1000, Stages())
