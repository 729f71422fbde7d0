"""export(): Checkpoint → specs → TracedGraph → LoweredGraph → weights streamed in → Bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from mtp_export.bundle.chat_ends import check_chat_template, read_chat_texts, reply_ends
from mtp_export.bundle.journal import Journal, identity
from mtp_export.bundle.manifest import BundleContents, write_bundle
from mtp_export.bundle.staging import check_free, staged_folder
from mtp_export.config import ExportConfig
from mtp_export.formats.format import Format, LoweredGraph, ReplyEnds, WriteRequest, format_of
from mtp_export.graph.ir import TracedGraph
from mtp_export.pair_graphs import Settings, pair_left_aside, room_bytes, trace_pair
from mtp_export.progress import Clock, Progress
from mtp_export.refinement import AsConfigured, Refinement, WeightsRequest
from mtp_export.source import texts
from mtp_export.source.checkpoint import hash_file
from mtp_export.source.pair import Pair, input_files, open_pair
from mtp_export.weights import mapping
from mtp_runtime.bundle.contract import Manifest
from mtp_runtime.text.tokenizer import Tokenizer

_AS_CONFIGURED = AsConfigured()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportResult:
    """A written bundle: its folder and manifest, what was left aside of its input, and notes for the user. Sizes are in
    bytes, times in seconds by stage."""

    output: Path
    left_aside: Sequence[str]
    notes: Sequence[str]
    manifest: Manifest
    input_bytes: int
    seconds: Mapping[str, float]


def export(
    config: ExportConfig, progress: Progress, refinement: Refinement = _AS_CONFIGURED, *, resume: bool = False
) -> ExportResult:
    """Export a pair as `config` says. `refinement` measures what `config.refinement` leaves open. With `resume`, graphs
    that a killed export of the same output has written already are taken over.

    Raises:
        MtpError: with the reason and the remedy; nothing is left behind then.
    """
    config.check()
    clock, format = Clock(), format_of(config.format)
    with staged_folder(config.output, force=config.force, resume=resume) as folder:
        pair = open_pair(config.source, config.graph.centroid_top_k)
        refinement.check(config, pair)
        journal = Journal(folder, _identity(config, pair))
        contents = texts.read_texts(pair.target, pair.target_spec)
        clock.lap("open")
        configured = trace_pair(Settings(config=config, pair=pair), format)
        unused = pair_left_aside(pair, configured.graphs)
        mapping.token_ordering(pair.drafter, pair.drafter_spec)  # a damaged one costs no conversion
        clock.lap("trace")
        ends = _check_chats(pair, contents, format, progress)
        clock.lap("template")
        traced = refinement.settings(configured, format, progress)
        written = frozenset(graph.role for graph in traced.graphs if format.file_name(graph.role) in journal.files)
        to_refine = WeightsRequest(traced=traced, format=format, folder=folder, written=written)
        refined = refinement.weights(to_refine, progress)
        clock.lap("refinement")
        file_sizes = format.file_sizes(traced.graphs, refined.values)
        check_free(config.output, room_bytes(format, sum(file_sizes.values())))
        lowered = _lower(traced.graphs, format, config.workers, progress)
        clock.lap("lower")
        request = WriteRequest(values=refined.values, folder=folder, reply_ends=ends, on_block=progress.advance)
        _write_graphs(lowered, format, request, journal, progress)
        clock.lap("weights")
        graph_files = {role: journal.files[format.file_name(role)] for role in file_sizes}
        text_files = {role: hash_file(path) for role, path in texts.write_texts(contents, folder).items()}
        bundle = BundleContents(traced=traced, bits=refined.bits, files=graph_files | text_files)
        manifest = write_bundle(bundle, folder, progress, container=format.container)
        clock.lap("bundle")
        refinement.gate(folder, traced.settings, progress)
        clock.lap("gate")
    return ExportResult(
        output=config.output,
        left_aside=unused,
        notes=texts.notes(pair.target, pair.target_spec),
        manifest=manifest,
        input_bytes=sum(entry.size_bytes for entry in manifest.inputs),
        seconds=clock.laps,
    )


def _identity(config: ExportConfig, pair: Pair) -> str:
    """Return the identity of all that the graphs of a bundle depend on. Weights count by size and time of change: a
    killed export is to go on without reading all of them first."""
    options = dataclasses.replace(config, output=Path(), force=False, workers=1)
    prompts = config.refinement.prompts
    files = [*input_files(pair), *([("prompts", prompts)] if prompts else [])]
    inputs = [(part, str(path), path.stat().st_size, path.stat().st_mtime_ns) for part, path in files]
    return identity(version("mtp-export"), dataclasses.asdict(options), inputs)


def _check_chats(pair: Pair, contents: Mapping[str, str], format: Format, progress: Progress) -> ReplyEnds | None:
    """Check the chat template, and return the tokens that end replies where the format has a use for them.

    Raises:
        CheckpointError: the template does not render, or not in LiteRT-LM as in transformers.
    """
    progress.start("trying the template", 0)
    chat = read_chat_texts(pair.target, pair.stop_token_ids, contents)
    if chat is None:
        return None
    check_chat_template(chat, contents["tokenizer"], for_stock=format.container)
    if not format.mends_reply_ends:
        return None
    where, bos = str(pair.target.folder), pair.target_spec.bos_token_id
    return reply_ends(chat, Tokenizer.parse(contents["tokenizer"], bos, where))


def _lower(graphs: Sequence[TracedGraph], format: Format, workers: int, progress: Progress) -> Sequence[LoweredGraph]:
    progress.start("converting graphs", sum(len(graph.segments) for graph in graphs))
    return format.lower(graphs, workers, progress.advance)


def _write_graphs(
    lowered: Sequence[LoweredGraph], format: Format, request: WriteRequest, journal: Journal, progress: Progress
) -> None:
    """Write the graphs that the journal has not, and note each in it."""
    sizes = {role: format.stored_bytes(values) for role, values in request.values.items()}
    progress.start("writing weights", sum(sizes.values()), of_bytes=True)
    for graph in lowered:
        if format.file_name(graph.role) in journal.files:
            progress.advance(sizes[graph.role])
        else:
            journal.add(*format.write(graph, request))
