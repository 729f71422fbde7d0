"""The `Refinement` of an export that measures its pair on prompts: settings, formats under a size, rounding, gate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from mtp_calibration.choose import head, mixed
from mtp_calibration.choose.calibration_texts import calibration_texts, tuning_prompts
from mtp_calibration.choose.gptq import round_target
from mtp_calibration.same_model.calibrate import CALIBRATION_NAME, calibrate
from mtp_export.bundle.staging import check_free
from mtp_export.check.prompts import calibration_prompts, in_turn
from mtp_export.config import ExportConfig
from mtp_export.errors import GateError
from mtp_export.formats.format import Format
from mtp_export.formats.sizes import litertlm_bytes
from mtp_export.pair_graphs import Settings, TracedPair, room_bytes, trace_pair
from mtp_export.progress import Progress
from mtp_export.refinement import RefinedWeights, WeightsRequest
from mtp_export.source import texts
from mtp_export.source.pair import Pair, check_floats, with_top_k
from mtp_export.weights.parameter import Parameter, Values
from mtp_export.weights.recipes import FLOAT32, WeightFormat
from mtp_runtime.errors import UserError

_MIXED_PROMPTS = 16
_DRAFTS_PROMPTS, _DRAFTS_TOKENS = 12, 48
_GATE_PROMPTS = 16
_MANIFEST_BYTES = 64 << 10  # at most, of any pair
_SECTIONS_SLACK_BYTES = 4 * (16 << 10)  # sections of a container are rounded up


class MeasuredRefinement:
    """Settles what a config leaves open. `gate_prompts`: how many prompts the gate runs."""

    def __init__(self, *, gate_prompts: int = _GATE_PROMPTS) -> None:
        self._gate_prompts = gate_prompts

    def check(self, config: ExportConfig, pair: Pair) -> None:
        if config.refinement.gate:
            check_floats(pair)

    def settings(self, traced: TracedPair, format: Format, progress: Progress) -> TracedPair:
        if not traced.settings.config.refinement.measured:
            return traced
        return trace_pair(with_measured(traced.settings, progress), format)

    def weights(self, request: WeightsRequest, progress: Progress) -> RefinedWeights:
        config = request.traced.settings.config.refinement
        largest = config.max_size_bytes
        sized = RefinedWeights(values=request.traced.values, bits={})
        if largest is not None:
            sized = within_size(request, largest, progress)
        if config.rounding != "gptq":
            return sized
        return dataclasses.replace(sized, values=rounded_by_gptq(request, sized.values, progress))

    def gate(self, folder: Path, settings: Settings, progress: Progress) -> None:
        if not settings.config.refinement.gate:
            return
        prompts = in_turn(calibration_prompts(), self._gate_prompts)
        calibration = calibrate(folder, settings.pair, prompts, on_stage=lambda name: progress.start(name, 0))
        if not calibration.passed:
            summary = calibration.verdict.summary
            raise GateError(f"the bundle does not pass the gate and was not kept: {summary}")
        (folder / CALIBRATION_NAME).write_text(calibration.to_json(), encoding="utf-8")


def with_measured(settings: Settings, progress: Progress) -> Settings:
    """Return the settings with what is best of `measured`, by the float pair's own answers."""
    progress.start("measuring drafts", 0)
    config, pair = settings.config, settings.pair
    refinement = config.refinement
    few = in_turn(tuning_prompts(refinement.prompts), _DRAFTS_PROMPTS)
    prompts = calibration_texts(pair.target, pair.target_spec, few)
    rounds = head.Rounds(pair, head.float_answers(pair, prompts, _DRAFTS_TOKENS))
    offset = config.graph.drafter_position_offset
    if "drafter_position_offset" in refinement.measured:
        offset = head.position_test(rounds, offset).chosen
    drafter = pair.drafter_spec
    if "centroid_top_k" in refinement.measured:
        curve = head.top_k_curve(rounds, offset, head.top_ks(drafter.head.num_centroids))
        drafter = with_top_k(drafter, head.enough(curve))
    graph = dataclasses.replace(config.graph, drafter_position_offset=offset)
    return Settings(
        config=dataclasses.replace(config, graph=graph), pair=dataclasses.replace(pair, drafter_spec=drafter)
    )


def within_size(request: WeightsRequest, largest_bytes: int, progress: Progress) -> RefinedWeights:
    """Return the parameters with fewer bits where they cost least, and the bits of each part; none where nothing is too
    large.

    Raises:
        UserError: the smallest formats are too large.
    """
    values, format, pair = request.traced.values, request.format, request.traced.settings.pair
    if _shipped_bytes(request, values) <= largest_bytes:
        return RefinedWeights(values=values, bits={})
    parts = mixed.parts_of(values)
    smallest = _shipped_bytes(request, _with_formats(values, parts, {part.name: part.formats[0] for part in parts}))
    if smallest > largest_bytes:
        raise UserError(
            f"--max-size is {largest_bytes / 1e9:.3f} GB and the smallest mixed recipe takes {smallest / 1e9:.3f} GB: "
            "give more, or a smaller --drafter-recipe"
        )

    def size(part: mixed.Part, weight_format: WeightFormat) -> int:
        parameters = [(name, values[role][name]) for role, name in part.parameters]
        return format.stored_bytes({name: dataclasses.replace(p, format=weight_format) for name, p in parameters})

    progress.start("measuring parts", len(parts))
    few = in_turn(tuning_prompts(request.traced.settings.config.refinement.prompts), _MIXED_PROMPTS)
    chosen_on = calibration_texts(pair.target, pair.target_spec, few)
    costs = mixed.measured(pair, parts, chosen_on, lambda name: progress.advance(1))
    room = largest_bytes - smallest + sum(size(part, part.formats[0]) for part in parts)
    formats = mixed.chosen(parts, costs, room - _SECTIONS_SLACK_BYTES, size)
    bits = {name: weight_format.bits for name, weight_format in formats.items()}
    return RefinedWeights(values=_with_formats(values, parts, formats), bits=bits)


def _shipped_bytes(request: WeightsRequest, values: Values) -> int:
    files = request.format.file_sizes(request.traced.graphs, values)
    if not request.format.container:
        return sum(files.values())
    tokenizer_bytes = texts.text_sizes(request.traced.settings.pair.target)["tokenizer"]
    return litertlm_bytes(files, tokenizer_bytes, _MANIFEST_BYTES)


def _with_formats(values: Values, parts: list[mixed.Part], formats: Mapping[str, WeightFormat]) -> Values:
    changed = {role: dict(part) for role, part in values.items()}
    for part in parts:
        for role, name in part.parameters:
            weight_format = formats[part.name].for_columns(values[role][name].shape[1])
            changed[role][name] = dataclasses.replace(values[role][name], format=weight_format)
    return changed


def rounded_by_gptq(request: WeightsRequest, values: Values, progress: Progress) -> Values:
    """Return the same parameters with the target's matrices rounded together with what they are multiplied with.

    Raises:
        OutputError: the disk has no room for what is rounded, beside the bundle.
    """
    fitted = {role: {name: _fitted(p) for name, p in part.items()} for role, part in values.items()}
    if "target" in request.written:
        return fitted
    settings, target = request.traced.settings, values["target"]
    graph_bytes = sum(request.format.file_sizes(request.traced.graphs, values).values())
    scratch_bytes = sum(math.prod(matrix.shape) for matrix in target.values() if matrix.format.bits < FLOAT32.bits)
    check_free(settings.config.output, room_bytes(request.format, graph_bytes) + scratch_bytes)
    formats = {
        name: request.format.stored_format(parameter)
        for name, parameter in target.items()
        if parameter.format.bits < FLOAT32.bits and not parameter.stored
    }
    progress.start("rounding matrices", len(formats))
    pair, prompts = settings.pair, tuning_prompts(settings.config.refinement.prompts)
    chosen_on = calibration_texts(pair.target, pair.target_spec, prompts)
    rounded = round_target(pair, formats, chosen_on, request.folder, lambda name: progress.advance(1))
    return fitted | {"target": {**target, **rounded}}


def _fitted(parameter: Parameter) -> Parameter:
    """A look-up table of few bits with the scales that cost its rows least: they are multiplied with nothing."""
    if not parameter.looked_up or parameter.stored or parameter.format.bits > 4:
        return parameter
    return dataclasses.replace(parameter, format=dataclasses.replace(parameter.format, scale="fitted"))
