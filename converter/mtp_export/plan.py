"""What an export would write, take and need, from config.json and the headers of the weights alone.

Sizes are those of `sizes.py`. Memory and time are estimates from what a full-size export took, E2B at int4 as TFLite on
two processors of a virtual machine with the checkpoint on its disk:

    time    trace: 2.5 s. Lowering: 6 s until the workers have loaded their converter, then for each segment 1.0 s
            (TFLite; ONNX 2.1 s) of one worker. Weights: 65 million values a second on each processor. The rest: every
            input and output is hashed, and the container written, at 700 MB a second.
    memory  anonymous memory of all processes. Lowering: 0.33 GiB in each. Weights: 0.33 GiB, four times the largest
            header (object, arrays, builder, bytes), and the blocks in flight, 48 MiB a processor.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtp_export.bundle.manifest import BundleContents, manifest_of
from mtp_export.config import ExportConfig
from mtp_export.formats.format import Format, format_of
from mtp_export.formats.roles import ROLES
from mtp_export.formats.sizes import litertlm_bytes
from mtp_export.graph.static import GraphShape, cache_shapes
from mtp_export.pair_graphs import (
    Contexts,
    Settings,
    TracedPair,
    contexts,
    pair_left_aside,
    trace_pair,
)
from mtp_export.source import texts
from mtp_export.source.headers import Headers
from mtp_export.source.pair import input_files, open_pair
from mtp_runtime.bundle.contract import MANIFEST_NAME, FileEntry
from mtp_runtime.errors import UserError

_TRACE_S, _START_S = 2.5, 6.0
_VALUES_PER_S = 65e6  # and processor
_BYTES_PER_S = 700e6
_PROCESS_BYTES, _FLIGHT_BYTES = 340 << 20, 48 << 20
_HEADER_COPIES = 4
_FLOAT_BYTES = 4
_SHORTEST_CONTEXT = 1024  # of those that memory is worked out for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disk:
    """A file system that is written to, by a folder on it."""

    folder: str
    needed_bytes: int
    free_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What running the bundle takes: what a round reads of weights, the tables of which a token reads one row, the
    KV cache of the default context when it is full, and the logits of the longest verify. All but the tables must fit
    into memory. `kv_cache_bytes_by_context`: of 1024, its doubles, the default and the longest context."""

    weights_bytes: int
    table_bytes: int
    kv_cache_bytes: int
    kv_cache_bytes_by_context: Mapping[int, int]
    logits_bytes: int

    @property
    def memory_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.logits_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What an export would do. files_bytes goes by name, signatures by role, seconds by stage; memory_bytes is the
    highest anonymous memory of all processes; left_aside is what changes nothing of what is exported, notes what a user
    had better know."""

    output: str
    model: str
    export_format: str
    backend: str
    recipe: str
    drafter_recipe: str
    files_bytes: Mapping[str, int]
    signatures: Mapping[str, Sequence[str]]
    cache_length: int
    context_length: int
    longest_context_length: int
    ring_length: int
    num_draft_tokens: int
    workers: int
    input_bytes: int
    download_bytes: int
    memory_bytes: int
    seconds: Mapping[str, float]
    disks: Sequence[Disk]
    device: Device
    left_aside: Sequence[str]
    notes: Sequence[str]

    @property
    def remedy(self) -> str:
        """What to do where a disk is too small; empty if everything fits."""
        for disk in self.disks:
            if disk.free_bytes < disk.needed_bytes:
                return (
                    f"{disk.folder} has {disk.free_bytes / 1e9:.2f} GB free and {disk.needed_bytes / 1e9:.2f} GB are "
                    "needed: free some space, choose another --output, or a smaller --recipe"
                )
        return ""


def plan(config: ExportConfig) -> Plan:
    """Work out what `export(config)` would do; nothing is written, and no weight is read.

    Raises:
        MtpError: what `export` would raise of these options, checkpoints and their headers.
    """
    config.check()
    if config.refinement.needs_prompts:
        raise UserError(
            "a plan reads no weight, and --max-size, --rounding gptq and auto are settled by measuring: plan without "
            "them; gptq changes no size"
        )
    format = format_of(config.format)
    with tempfile.TemporaryDirectory(prefix="mtp-plan-") as scratch:
        headers = Headers(Path(scratch))
        pair = open_pair(config.source, config.graph.centroid_top_k, headers.find)
        texts.check_texts(pair.target, pair.target_spec)
        traced = trace_pair(Settings(config=config, pair=pair), format)
        inputs = {f"{part}/{path.name}": path.stat().st_size for part, path in input_files(pair)}
        graph_sizes = format.file_sizes(traced.graphs, traced.values)
        files = _files(traced, format, graph_sizes, inputs)
        unused = pair_left_aside(pair, traced.graphs, reads_weights=False)
        notes = texts.notes(pair.target, pair.target_spec)
    shape, manifest = traced.shape, manifest_of(BundleContents(traced=traced, bits={}, files={}), ())
    return Plan(
        output=str(config.output),
        model=config.source.model,
        export_format=format.name,
        backend=format.backend,
        recipe=config.quantisation.recipe,
        drafter_recipe=config.quantisation.drafter,
        files_bytes=files,
        signatures={graph.role: [t.signature.name for t in graph.signatures] for graph in traced.graphs},
        cache_length=shape.cache_length,
        context_length=manifest.context_length,
        longest_context_length=manifest.longest_context_length,
        ring_length=manifest.ring_length,
        num_draft_tokens=shape.num_draft_tokens,
        workers=config.workers,
        input_bytes=sum(inputs.values()),
        download_bytes=headers.download_bytes,
        memory_bytes=_memory(traced, format, graph_sizes),
        seconds=_seconds(traced, format, sum(inputs.values()), files),
        disks=_disks(config.output, sum(files.values()), headers.download_bytes),
        device=_device(traced, format),
        left_aside=unused,
        notes=notes,
    )


def _files(
    traced: TracedPair, format: Format, graph_sizes: Mapping[str, int], inputs: Mapping[str, int]
) -> dict[str, int]:
    """Return the bytes of every file of the bundle, by name."""
    text_sizes = texts.text_sizes(traced.settings.pair.target)
    plain = {role: _entry(format.file_name(role), size) for role, size in graph_sizes.items()}
    plain |= {role: _entry(texts.file_name(role), size) for role, size in text_sizes.items()}
    of_inputs = [_entry(name, size) for name, size in inputs.items()]

    def manifest_bytes(entries: Mapping[str, FileEntry]) -> int:
        return len(manifest_of(BundleContents(traced=traced, bits={}, files=entries), of_inputs).to_json())

    container = {}
    if format.container:
        size = litertlm_bytes(graph_sizes, text_sizes["tokenizer"], manifest_bytes(plain))
        container = {"litertlm": _entry(f"{traced.settings.config.source.model}.litertlm", size)}
    entries = plain | container
    return {entry.path: entry.size_bytes for entry in entries.values()} | {MANIFEST_NAME: manifest_bytes(entries)}


def _entry(path: str, size_bytes: int) -> FileEntry:
    """An entry of a manifest whose hash is as long as that of the finished file."""
    return FileEntry(path=path, sha256="0" * 64, size_bytes=size_bytes)


def _memory(traced: TracedPair, format: Format, graph_sizes: Mapping[str, int]) -> int:
    workers = min(traced.settings.config.workers, sum(len(graph.segments) for graph in traced.graphs))
    # What a graph's file has besides its weights; weights beside a graph are no part of its file.
    headers = [graph_sizes[role] - format.stored_bytes(values) for role, values in traced.values.items()]
    writing = _PROCESS_BYTES + _HEADER_COPIES * max(0, *headers) + _FLIGHT_BYTES * _processors()
    return max(_PROCESS_BYTES * (1 + workers), writing)


def _seconds(traced: TracedPair, format: Format, input_bytes: int, files: Mapping[str, int]) -> dict[str, float]:
    """Return seconds by stage, as an export names them."""
    segments = sum(len(graph.segments) for graph in traced.graphs)
    count = sum(math.prod(parameter.shape) for part in traced.values.values() for parameter in part.values())
    container = sum(size for name, size in files.items() if name.endswith(".litertlm"))
    return {
        "trace": _TRACE_S,
        "lower": round(_START_S + segments * format.segment_s / traced.settings.config.workers, 1),
        "weights": round(count / (_VALUES_PER_S * _processors()), 1),
        "bundle": round((input_bytes + sum(files.values()) + container) / _BYTES_PER_S, 1),
    }


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _disks(output: Path, needed: int, download: int) -> list[Disk]:
    """The disk of the output, and that of the Hugging Face cache if something is to be downloaded to another one."""
    folder = _existing(output.absolute().parent)
    if not download:
        return [_disk(folder, needed)]
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = _existing(Path(HF_HUB_CACHE))
    if cache.stat().st_dev == folder.stat().st_dev:
        return [_disk(folder, needed + download)]
    return [_disk(folder, needed), _disk(cache, download)]


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def _disk(folder: Path, needed: int) -> Disk:
    return Disk(folder=str(folder), needed_bytes=needed, free_bytes=shutil.disk_usage(folder).free)


def _device(traced: TracedPair, format: Format) -> Device:
    spec, shape = traced.settings.pair.target_spec, traced.shape
    of_role = {role: format.stored_bytes(values) for role, values in traced.values.items()}
    by_context = _cache_bytes_by_context(traced)
    return Device(
        weights_bytes=sum(size for role, size in of_role.items() if not ROLES[role].looks_up),
        table_bytes=sum(size for role, size in of_role.items() if ROLES[role].looks_up),
        kv_cache_bytes=by_context[_contexts(traced).default],
        kv_cache_bytes_by_context=by_context,
        logits_bytes=(shape.num_draft_tokens + 1) * spec.vocab_size * _FLOAT_BYTES,
    )


def _contexts(traced: TracedPair) -> Contexts:
    """Return the contexts of a bundle by the slots that each takes; one where it is not chosen."""
    config, length = traced.settings.config, traced.shape.cache_length
    chosen = contexts(config, traced.settings.pair)
    return chosen if config.format.chooses_context else Contexts(longest=length, default=length)


def _cache_bytes_by_context(traced: TracedPair) -> dict[int, int]:
    """Return the bytes of all KV caches by context; rings have the same in each."""
    context, target = _contexts(traced), traced.settings.pair.target_spec
    lengths = {context.default, context.longest}
    doubled = _SHORTEST_CONTEXT
    while doubled < context.longest and traced.settings.config.format.chooses_context:
        lengths.add(doubled)
        doubled *= 2
    return {
        length: _FLOAT_BYTES
        * sum(math.prod(shape) for shape in cache_shapes(target, _resized(traced, length)).values())
        for length in sorted(lengths)
    }


def _resized(traced: TracedPair, length: int) -> GraphShape:
    return dataclasses.replace(traced.shape, cache_length=length)
