"""export(): Checkpoint → specs → TracedGraph → LoweredGraph → weights streamed in → Bundle."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec

from mtp_export.arch import gemma4
from mtp_export.bundle import litertlm
from mtp_export.bundle.chat_ends import check_chat_template, read_chat_texts, reply_ends
from mtp_export.bundle.journal import Journal, identity
from mtp_export.bundle.staging import staged_folder
from mtp_export.config import MIN_CACHE_LENGTH, ExportConfig, in_range
from mtp_export.errors import GateError, OutputError
from mtp_export.formats import sizes
from mtp_export.formats.tflite.chain import LoweredGraph
from mtp_export.formats.tflite.gpu_table import DELEGATED_ROLES
from mtp_export.formats.tflite.passes.composites import with_composites
from mtp_export.formats.tflite.passes.single_buffer import with_single_buffer
from mtp_export.formats.tflite.passes.squares import with_squares_reshaped_first
from mtp_export.formats.tflite.write import write_graph
from mtp_export.graph.dynamic import trace_graphs
from mtp_export.graph.ir import TracedGraph
from mtp_export.graph.static import GraphShape, trace_drafter, trace_embedder, trace_target
from mtp_export.progress import Clock, Progress
from mtp_export.source import texts
from mtp_export.source.checkpoint import hash_file
from mtp_export.source.left_aside import left_aside
from mtp_export.source.pair import Pair, check_floats, input_files, open_pair
from mtp_export.source.stored_integers import check_runs
from mtp_export.source.templates import read_template
from mtp_export.weights import mapping
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.recipes import DRAFTER_RECIPES, FLOAT32, RECIPES, WeightFormat, with_embedders
from mtp_runtime.bundle.contract import BATCH_ROLES, FORMAT_VERSION, FileEntry, Manifest, batch_role
from mtp_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mtp_export.formats.tflite.passes.reply_ends import ReplyEnds

EMBEDDERS = ("embedder", "per_layer_embedder")
_SPARE_BYTES = 64 << 20  # of disk, for text files
_GATE_PROMPTS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export wrote, left aside of its input, and took, and what a user had better know. Sizes are in
    bytes, times in seconds."""

    output: Path
    left_aside: Sequence[str]
    notes: Sequence[str]
    manifest: Manifest
    input_bytes: int
    seconds: Mapping[str, float]


def export(config: ExportConfig, progress: Progress, *, resume: bool = False) -> ExportResult:
    """Export a pair as `config` says; with `resume`, without the graphs that a killed export of it has written already.

    Raises:
        MtpError: with what was wrong and what to do; nothing is left behind then.
    """
    clock = Clock()
    config.check()
    with staged_folder(config.output, force=config.force, resume=resume) as folder:
        pair = open_pair(config)
        if config.gate:
            check_floats(pair)
        journal = Journal(folder, _made_of(config, pair))
        shape = graph_shape(config, pair)
        format = FORMATS[config.export_format]
        contents = texts.read_texts(pair.target, pair.target_spec)
        clock.lap("open")
        chat = read_chat_texts(pair.target, pair.stop_token_ids, contents)

        @functools.cache
        def try_template() -> None:
            if chat is not None:
                check_chat_template(chat, contents["tokenizer"], for_stock=format.container)

        if config.measured:
            try_template()  # prompts may have messages, which the template is rendered with here
            config, pair = _choices().with_measured(config, pair, progress)
            clock.lap("drafts")
        graphs = format.trace(config, pair, shape)
        values = pair_parameters(config, pair, graphs)
        unused = pair_left_aside(pair, graphs)
        mapping.token_ordering(pair.drafter, pair.drafter_spec)  # a damaged one costs no conversion
        clock.lap("trace")
        progress.start("trying the template", 0)
        try_template()
        clock.lap("template")
        bits: Mapping[str, int] = {}
        if config.max_size_bytes is not None:
            values, bits = _choices().within_size(config, pair, graphs, values, config.max_size_bytes, progress)
            clock.lap("mixed recipe")
        graph_bytes = sum(sizes.graph_files(config, graphs, values).values())
        # With a container, graphs lie in the folder twice: as plain files, and within it.
        scratch_bytes = _matrix_values(values) if config.rounding == "gptq" else 0
        _check_disk(config.output, graph_bytes * (2 if format.container else 1) + scratch_bytes + _SPARE_BYTES)
        if config.rounding == "gptq" and sizes.file_name(config.export_format, "target") not in journal.files:
            values = _choices().rounded_by_gptq(config, pair, values, folder, progress)
            clock.lap("gptq")
        ends = None
        if chat is not None and format.container and config.delegate == "cpu":  # the runtime that needs it
            where, bos = str(pair.target.folder), pair.target_spec.bos_token_id
            ends = reply_ends(chat, Tokenizer.parse(contents["tokenizer"], bos, where))
        files = format.write(config, graphs, values, folder, journal, progress, clock, ends)
        files |= texts.write_texts(contents, folder)
        manifest = _write_rest(config, pair, shape, graphs, files, bits, folder, journal, progress)
        clock.lap("bundle")
        if config.gate:
            _pass_gate(folder, pair, progress)
            clock.lap("gate")
    return ExportResult(
        output=config.output,
        left_aside=unused,
        notes=texts.notes(pair.target, pair.target_spec),
        manifest=manifest,
        input_bytes=sum(entry.size_bytes for entry in manifest.inputs),
        seconds=clock.laps,
    )


def _choices() -> ModuleType:
    """What measures a pair needs this module's, so it is imported where it is called."""
    from mtp_calibration.choose import choices

    return choices


def _matrix_values(values: Mapping[str, Mapping[str, Parameter]]) -> int:
    return sum(math.prod(p.shape) for p in values["target"].values() if p.format.bits < FLOAT32.bits)


def _made_of(config: ExportConfig, pair: Pair) -> str:
    """Identity of all that the graphs of a bundle depend on. Weights by size and time of change: a killed export is to
    go on without reading all of them first."""
    asked = dataclasses.replace(config, output=Path(), force=False, workers=1)
    files = [*input_files(pair), *([("prompts", config.prompts)] if config.prompts else [])]
    inputs = [(part, str(path), path.stat().st_size, path.stat().st_mtime_ns) for part, path in files]
    return identity(version("mtp-export"), dataclasses.asdict(asked), inputs)


def graph_shape(config: ExportConfig, pair: Pair) -> GraphShape:
    """The static sizes of a pair's graphs.

    Raises:
        UserError: --cache-length is nothing that the target or its prefill can have.
    """
    longest = pair.target_spec.max_position_embeddings
    cache_length = min(pair.model.cache_length, longest) if config.cache_length is None else config.cache_length
    shortest = max(MIN_CACHE_LENGTH, min(pair.model.prefill_lengths) + 1)  # a bundle needs a prefill
    in_range("--cache-length", cache_length, shortest, longest)
    return GraphShape(
        cache_length=cache_length,
        num_draft_tokens=pair.model.num_draft_tokens if config.num_draft_tokens is None else config.num_draft_tokens,
        prefill_lengths=tuple(n for n in pair.model.prefill_lengths if n < cache_length),
        prefix_lengths=pair.model.prefix_lengths,
        single_buffer=config.delegate == "gpu",
    )


def drafter_recipe(config: ExportConfig) -> str:
    """Name of the drafter's recipe."""
    return config.drafter_recipe or DRAFTER_RECIPES[config.recipe]


def embedder_recipe(config: ExportConfig) -> str:
    """Name of the recipe of the look-up tables."""
    return config.embedder_recipe or config.recipe


def pair_parameters(config: ExportConfig, pair: Pair, graphs: Sequence[TracedGraph]) -> dict[str, dict[str, Parameter]]:
    """What the parameters of each graph are made of; nothing is read yet.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or dtype.
    """
    *of_target, drafter = graphs
    recipe = RECIPES[drafter_recipe(config)]
    of_embedders = with_embedders(RECIPES[config.recipe], RECIPES[embedder_recipe(config)])
    values = mapping.target_parameters(pair.target, of_target, of_embedders)
    for part in values.values():
        for name, parameter in part.items():
            if parameter.stored:
                check_runs(name, parameter.format, config.export_format, looked_up=parameter.looked_up)
    # LiteRT-LM forgets a stop token that was drafted and accepted, so none is drafted (docs/litert-lm.md).
    never_drafted = pair.stop_token_ids if FORMATS[config.export_format].container else ()
    of_drafter = mapping.drafter_parameters(pair.drafter, drafter, pair.drafter_spec, recipe, never_drafted)
    return values | {"drafter": of_drafter}


def pair_left_aside(pair: Pair, graphs: Sequence[TracedGraph], *, reads_weights: bool = True) -> tuple[str, ...]:
    """What is not exported of a pair's checkpoints, because it changes nothing of what is, in short phrases."""
    *of_target, drafter = graphs
    drafter_tensors = mapping.drafter_tensors(drafter, pair.drafter_spec)
    of_drafter = left_aside(pair.drafter, drafter_tensors, reads_weights=reads_weights)
    return (
        *left_aside(pair.target, mapping.target_tensors(of_target), reads_weights=reads_weights),
        *pair.target.left_aside,
        *texts.left_aside(pair.target, pair.target_spec),
        *(f"of the drafter: {phrase}" for phrase in of_drafter),
    )


def _check_disk(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed:
        raise OutputError(
            f"{output.absolute().parent} has {free / 1e9:.2f} GB free and the bundle needs {needed / 1e9:.2f} GB: "
            "free some space, or choose another --output"
        )


def _weight_bytes(config: ExportConfig, values: Mapping[str, Mapping[str, Parameter]]) -> int:
    return sum(sizes.stored_bytes(config.export_format, part) for part in values.values())


def _trace_tflite(config: ExportConfig, pair: Pair, shape: GraphShape) -> list[TracedGraph]:
    target = pair.target_spec.of_graphs
    return [
        trace_target(target, shape),
        trace_embedder(target, "embedder"),
        trace_embedder(target, "per_layer_embedder"),
        trace_drafter(
            pair.drafter_spec,
            target,
            shape,
            position_offset=config.drafter_position_offset,
            row_scales=drafter_recipe(config) != "f32",
        ),
    ]


def _write_tflite(
    config: ExportConfig,
    graphs: Sequence[TracedGraph],
    values: Mapping[str, Mapping[str, Parameter]],
    folder: Path,
    journal: Journal,
    progress: Progress,
    clock: Clock,
    ends: ReplyEnds | None,
) -> dict[str, Path]:
    from mtp_export.formats.tflite import chain as tflite
    from mtp_export.formats.tflite.passes.reply_ends import with_reply_ends

    progress.start("converting graphs", sum(len(graph.segments) for graph in graphs))
    lowered = tflite.lower(graphs, config.workers, progress.advance)
    lowered = [for_delegate(config, graph) for graph in lowered]
    clock.lap("lower")
    progress.start("writing weights", _weight_bytes(config, values), of_bytes=True)
    files = {graph.role: folder / f"{graph.role}.tflite" for graph in lowered}
    for graph in sorted(lowered, key=lambda graph: graph.role == "target"):  # which needs rows of the embedders
        if graph.role == "target" and ends is not None:
            graph = with_reply_ends(graph, ends, [files[role] for role in EMBEDDERS])
        if files[graph.role].name in journal.files:
            progress.advance(sizes.stored_bytes("tflite", values[graph.role]))
            continue
        write_graph(graph, values[graph.role], files[graph.role], progress.advance)
        journal.add(files[graph.role])
    clock.lap("weights")
    return files


def for_delegate(config: ExportConfig, graph: LoweredGraph) -> LoweredGraph:
    """A converted graph with the operators that its backend wants."""
    if config.delegate == "cpu":
        return with_squares_reshaped_first(graph)
    if graph.role in DELEGATED_ROLES:
        graph = with_single_buffer(graph)
        if config.composites:
            graph = with_composites(graph)
    return graph


def _trace_onnx(config: ExportConfig, pair: Pair, shape: GraphShape) -> list[TracedGraph]:
    return trace_graphs(
        pair.target_spec.of_graphs,
        pair.drafter_spec,
        position_offset=config.drafter_position_offset,
        quantised_head=drafter_recipe(config) != "f32",
    )


def _write_onnx(
    config: ExportConfig,
    graphs: Sequence[TracedGraph],
    values: Mapping[str, Mapping[str, Parameter]],
    folder: Path,
    journal: Journal,
    progress: Progress,
    clock: Clock,
    ends: ReplyEnds | None,
) -> dict[str, Path]:
    from mtp_export.formats.onnx import convert as onnx
    from mtp_export.formats.onnx.batch import write_batched
    from mtp_export.formats.onnx.write import write_onnx

    progress.start("converting graphs", sum(len(graph.segments) for graph in graphs))
    lowered = onnx.lower(graphs, config.workers, portable=config.portable, on_segments=progress.advance)
    clock.lap("lower")
    progress.start("writing weights", _weight_bytes(config, values), of_bytes=True)
    files = {}
    for graph in lowered:
        files[graph.role] = folder / f"{graph.role}.onnx"
        files[f"{graph.role}_data"] = folder / f"{graph.role}.onnx.data"
        if files[graph.role].name in journal.files:
            progress.advance(sizes.stored_bytes("onnx", values[graph.role]))
            continue
        write_onnx(graph, values[graph.role], files[graph.role], progress.advance)
        journal.add(files[graph.role], files[f"{graph.role}_data"])
    for traced in graphs if config.batch_size > 1 else ():
        if traced.role in BATCH_ROLES:
            files[batch_role(traced.role)] = folder / f"{traced.role}.batch.onnx"
            write_batched(
                files[traced.role],
                traced.signatures[0].signature,
                config.batch_size,
                files[batch_role(traced.role)],
            )
    clock.lap("weights")
    return files


def _onnx_format(parameter: Parameter) -> WeightFormat:
    from mtp_export.formats.onnx.write import block_size

    return dataclasses.replace(parameter.format, block_size=block_size(parameter))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Format:
    """What differs between export formats: how graphs are traced and written, the format that a parameter is stored
    in, and whether one file holds all graphs."""

    trace: Callable[[ExportConfig, Pair, GraphShape], list[TracedGraph]]
    write: Callable[..., dict[str, Path]]
    stored_format: Callable[[Parameter], WeightFormat]
    container: bool


FORMATS = {
    "tflite": _Format(trace=_trace_tflite, write=_write_tflite, stored_format=lambda p: p.format, container=True),
    "onnx": _Format(trace=_trace_onnx, write=_write_onnx, stored_format=_onnx_format, container=False),
}


def _write_rest(
    config: ExportConfig,
    pair: Pair,
    shape: GraphShape,
    graphs: Sequence[TracedGraph],
    files: Mapping[str, Path],
    bits: Mapping[str, int],
    folder: Path,
    journal: Journal,
    progress: Progress,
) -> Manifest:
    inputs = input_files(pair)
    progress.start("hashing and bundling", len(inputs) + len(graphs) + 1)
    hashes = [_hash_input(part, path, progress) for part, path in inputs]
    entries = {role: journal.files.get(path.name) or hash_file(path) for role, path in files.items()}
    manifest = manifest_of(config, pair, shape, graphs, hashes, entries)
    if bits:
        manifest = msgspec.structs.replace(manifest, recipe="mixed", embedder_recipe="mixed", bits=bits)
    progress.advance(len(graphs))
    if FORMATS[config.export_format].container:
        container = folder / f"{config.model}.litertlm"
        litertlm.write_litertlm(folder, manifest, container)
        manifest = msgspec.structs.replace(manifest, files={**manifest.files, "litertlm": hash_file(container)})
    litertlm.write_manifest(folder, manifest)
    progress.advance(1)
    return manifest


def manifest_of(
    config: ExportConfig,
    pair: Pair,
    shape: GraphShape,
    graphs: Sequence[TracedGraph],
    inputs: Sequence[FileEntry],
    files: Mapping[str, FileEntry],
) -> Manifest:
    """The manifest of a bundle of these files, made from these inputs."""
    generation = texts.generation(pair.target, pair.target_spec)
    return Manifest(
        format_version=FORMAT_VERSION,
        tool_version=version("mtp-export"),
        model=config.model,
        export_format=config.export_format,
        recipe=config.recipe,
        drafter_recipe=drafter_recipe(config),
        embedder_recipe=embedder_recipe(config),
        rounding=config.rounding,
        cache_length=shape.cache_length,
        num_draft_tokens=shape.num_draft_tokens,
        context_length=shape.cache_length - shape.num_draft_tokens,
        batch_size=config.batch_size,
        drafter_position_offset=config.drafter_position_offset,
        vocab_size=pair.target_spec.vocab_size,
        hidden_size=pair.target_spec.hidden_size,
        bos_token_id=pair.target_spec.bos_token_id,
        stop_token_ids=pair.stop_token_ids,
        suppress_tokens=generation.suppress_tokens,
        sampler=generation.sampler,
        special_tokens=texts.special_tokens(pair.target),
        chat_template=read_template(pair.target).origin(),
        images=gemma4.read_image_settings(pair.target.config),
        target=pair.target_spec.as_manifest(),
        drafter=pair.drafter_spec.as_manifest(),
        inputs=tuple(inputs),
        files=files,
        signatures={graph.role: tuple(t.signature for t in graph.signatures) for graph in graphs},
    )


def _pass_gate(folder: Path, pair: Pair, progress: Progress) -> None:
    """Measure the finished bundle and write what was found into it.

    Raises:
        GateError: it is not the model any more, with the diagnosis.
    """
    # What measures a bundle needs this module's pair.
    from mtp_calibration.same_model.calibrate import CALIBRATION_NAME, calibrate
    from mtp_export.check.prompts import calibration_prompts, in_turn

    found = calibrate(
        folder, pair, in_turn(calibration_prompts(), _GATE_PROMPTS), on_stage=lambda name: progress.start(name, 0)
    )
    if not found.passed:
        raise GateError(f"the bundle does not pass the gate and was not kept: {found.verdict.summary}")
    (folder / CALIBRATION_NAME).write_text(found.to_json(), encoding="utf-8")


def _hash_input(part: str, path: Path, progress: Progress) -> FileEntry:
    entry = hash_file(path)
    progress.advance(1)
    return FileEntry(path=f"{part}/{entry.path}", sha256=entry.sha256, size_bytes=entry.size_bytes)
