"""What an export chooses by measuring its pair on prompts: settings of the drafter, formats under a size, rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtp_calibration.choose import head, mixed
from mtp_calibration.choose.calibration_texts import calibration_texts, tuning_prompts
from mtp_calibration.choose.gptq import round_target
from mtp_export.check.prompts import in_turn
from mtp_export.config import ExportConfig
from mtp_export.formats import sizes
from mtp_export.graph.ir import TracedGraph
from mtp_export.pipeline import FORMATS
from mtp_export.progress import Progress
from mtp_export.source import texts
from mtp_export.source.pair import Pair, with_top_k
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.recipes import FLOAT32, WeightFormat
from mtp_runtime.errors import UserError

_MIXED_PROMPTS = 16
_DRAFTS_PROMPTS, _DRAFTS_TOKENS = 12, 48
_MANIFEST_BYTES = 64 << 10  # at most, of any pair
_SECTIONS_SLACK_BYTES = 4 * (16 << 10)  # sections of a container are rounded up


def with_measured(config: ExportConfig, pair: Pair, progress: Progress) -> tuple[ExportConfig, Pair]:
    """The settings that are to be what is best, measured on the float pair's own answers."""
    progress.start("measuring drafts", 0)
    prompts = calibration_texts(pair.target, pair.target_spec, in_turn(tuning_prompts(config.prompts), _DRAFTS_PROMPTS))
    rounds = head.Rounds(pair, head.float_answers(pair, prompts, _DRAFTS_TOKENS))
    if "drafter_position_offset" in config.measured:
        found = head.position_test(rounds, config.drafter_position_offset)
        config = dataclasses.replace(config, drafter_position_offset=found.chosen)
    if "centroid_top_k" in config.measured:
        counts = head.top_ks(pair.drafter_spec.head.num_centroids)
        curve = head.top_k_curve(rounds, config.drafter_position_offset, counts)
        pair = dataclasses.replace(pair, drafter_spec=with_top_k(pair.drafter_spec, head.enough(curve)))
    return config, pair


def within_size(
    config: ExportConfig,
    pair: Pair,
    graphs: Sequence[TracedGraph],
    values: dict[str, dict[str, Parameter]],
    most_bytes: int,
    progress: Progress,
) -> tuple[dict[str, dict[str, Parameter]], Mapping[str, int]]:
    """The parameters with fewer bits where they cost least, and the bits of each part; none where nothing is too large.

    Raises:
        UserError: the smallest formats are too large.
    """

    def shipped_bytes(values: Mapping[str, Mapping[str, Parameter]]) -> int:
        files = sizes.graph_files(config, graphs, values)
        if not FORMATS[config.export_format].container:
            return sum(files.values())
        return sizes.litertlm_bytes(files, texts.text_sizes(pair.target)["tokenizer"], _MANIFEST_BYTES)

    def with_formats(formats: Mapping[str, WeightFormat]) -> dict[str, dict[str, Parameter]]:
        changed = {role: dict(part) for role, part in values.items()}
        for part in parts:
            for role, name in part.parameters:
                format = formats[part.name].for_columns(values[role][name].shape[1])
                changed[role][name] = dataclasses.replace(values[role][name], format=format)
        return changed

    def size(part: mixed.Part, format: WeightFormat) -> int:
        of_part = {n: dataclasses.replace(values[r][n], format=format) for r, n in part.parameters}
        return sizes.stored_bytes(config.export_format, of_part)

    whole = shipped_bytes(values)
    if whole <= most_bytes:
        return values, {}
    parts = mixed.parts_of(values)
    smallest = shipped_bytes(with_formats({part.name: part.formats[0] for part in parts}))
    if smallest > most_bytes:
        raise UserError(
            f"--max-size is {most_bytes / 1e9:.3f} GB and the smallest mixed recipe takes {smallest / 1e9:.3f} GB: "
            "give more, or a smaller --drafter-recipe"
        )
    progress.start("measuring parts", len(parts))
    chosen_on = calibration_texts(
        pair.target, pair.target_spec, in_turn(tuning_prompts(config.prompts), _MIXED_PROMPTS)
    )
    costs = mixed.measured(pair, parts, chosen_on, lambda name: progress.advance(1))
    room = most_bytes - smallest + sum(size(part, part.formats[0]) for part in parts)
    formats = mixed.chosen(parts, costs, room - _SECTIONS_SLACK_BYTES, size)
    return with_formats(formats), {name: format.bits for name, format in formats.items()}


def rounded_by_gptq(
    config: ExportConfig,
    pair: Pair,
    values: Mapping[str, dict[str, Parameter]],
    folder: Path,
    progress: Progress,
) -> dict[str, dict[str, Parameter]]:
    """The same parameters with the target's matrices rounded together with what they are multiplied with."""
    chosen = FORMATS[config.export_format].stored_format
    formats = {
        name: chosen(parameter)
        for name, parameter in values["target"].items()
        if parameter.format.bits < FLOAT32.bits and not parameter.stored
    }
    progress.start("rounding matrices", len(formats))
    chosen_on = calibration_texts(pair.target, pair.target_spec, tuning_prompts(config.prompts))
    rounded = round_target(pair, formats, chosen_on, folder, lambda name: progress.advance(1))
    return {role: {name: _fitted(p) for name, p in part.items()} for role, part in values.items()} | {
        "target": values["target"] | rounded
    }


def _fitted(parameter: Parameter) -> Parameter:
    """A look-up table of few bits with the scales that cost its rows least: they are multiplied with nothing."""
    if not parameter.looked_up or parameter.stored or parameter.format.bits > 4:
        return parameter
    return dataclasses.replace(parameter, format=dataclasses.replace(parameter.format, scale="fitted"))
