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

from mtp_export import pipeline
from mtp_export.arch.spec import TargetSpec
from mtp_export.config import ExportConfig
from mtp_export.formats import sizes
from mtp_export.graph.ir import TracedGraph
from mtp_export.graph.static import GraphShape
from mtp_export.source import texts
from mtp_export.source.headers import Headers
from mtp_export.source.pair import Pair, input_files, open_pair
from mtp_export.weights.parameter import Parameter
from mtp_runtime.bundle.contract import GRAPH_ROLES, MANIFEST_NAME, FileEntry
from mtp_runtime.errors import UserError

_TRACE_S, _START_S = 2.5, 6.0
_SEGMENT_S = {"tflite": 1.0, "onnx": 2.1}
_VALUES_PER_S = 65e6  # and processor
_BYTES_PER_S = 700e6
_PROCESS_BYTES, _FLIGHT_BYTES = 340 << 20, 48 << 20
_HEADER_COPIES = 4
_FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disk:
    """A file system that is written to, by a folder on it."""

    folder: str
    needed_bytes: int
    free_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What running the bundle takes: what a round reads of weights, the tables of which a token reads one row, the
    KV cache when it is full, and the logits of the longest verify. All but the tables must fit into memory."""

    weights_bytes: int
    table_bytes: int
    kv_cache_bytes: int
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
    recipe: str
    drafter_recipe: str
    files_bytes: Mapping[str, int]
    signatures: Mapping[str, Sequence[str]]
    cache_length: int
    context_length: int
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
    if config.max_size_bytes is not None or config.measured or config.rounding == "gptq":
        raise UserError(
            "a plan reads no weight, and --max-size, --rounding gptq and auto are settled by measuring: plan without "
            "them; gptq changes no size"
        )
    with tempfile.TemporaryDirectory(prefix="mtp-plan-") as scratch:
        headers = Headers(Path(scratch))
        pair = open_pair(config, headers.find)
        texts.check_texts(pair.target, pair.target_spec)
        shape = pipeline.graph_shape(config, pair)
        graphs = pipeline.FORMATS[config.export_format].trace(config, pair, shape)
        values = pipeline.pair_parameters(config, pair, graphs)
        inputs = {f"{part}/{path.name}": path.stat().st_size for part, path in input_files(pair)}
        files = _files(config, pair, shape, graphs, values, inputs)
        unused = pipeline.pair_left_aside(pair, graphs, reads_weights=False)
        notes = texts.notes(pair.target, pair.target_spec)
    return Plan(
        output=str(config.output),
        model=config.model,
        export_format=config.export_format,
        recipe=config.recipe,
        drafter_recipe=pipeline.drafter_recipe(config),
        files_bytes=files,
        signatures={graph.role: [traced.signature.name for traced in graph.signatures] for graph in graphs},
        cache_length=shape.cache_length,
        context_length=shape.cache_length - shape.num_draft_tokens,
        num_draft_tokens=shape.num_draft_tokens,
        workers=config.workers,
        input_bytes=sum(inputs.values()),
        download_bytes=headers.download_bytes,
        memory_bytes=_memory(config, graphs, files, values),
        seconds=_seconds(config, graphs, values, sum(inputs.values()), files),
        disks=_disks(config.output, sum(files.values()), headers.download_bytes),
        device=_device(config, pair.target_spec, shape, values),
        left_aside=unused,
        notes=notes,
    )


def _files(
    config: ExportConfig,
    pair: Pair,
    shape: GraphShape,
    graphs: Sequence[TracedGraph],
    values: Mapping[str, Mapping[str, Parameter]],
    inputs: Mapping[str, int],
) -> dict[str, int]:
    """Bytes of every file of the bundle, by name."""
    graph_sizes = sizes.graph_files(config, graphs, values)
    text_sizes = texts.text_sizes(pair.target)
    format = config.export_format
    entries = {role: _entry(sizes.file_name(format, role), size) for role, size in graph_sizes.items()}
    entries |= {role: _entry(texts.file_name(role), size) for role, size in text_sizes.items()}

    def manifest_bytes() -> int:
        of_inputs = [_entry(name, size) for name, size in inputs.items()]
        return len(pipeline.manifest_of(config, pair, shape, graphs, of_inputs, entries).to_json())

    if pipeline.FORMATS[config.export_format].container:
        size = sizes.litertlm_bytes(graph_sizes, text_sizes["tokenizer"], manifest_bytes())
        entries["litertlm"] = _entry(f"{config.model}.litertlm", size)
    return {entry.path: entry.size_bytes for entry in entries.values()} | {MANIFEST_NAME: manifest_bytes()}


def _entry(path: str, size_bytes: int) -> FileEntry:
    """An entry of a manifest whose hash is as long as that of the finished file."""
    return FileEntry(path=path, sha256="0" * 64, size_bytes=size_bytes)


def _memory(
    config: ExportConfig,
    graphs: Sequence[TracedGraph],
    files: Mapping[str, int],
    values: Mapping[str, Mapping[str, Parameter]],
) -> int:
    workers = min(config.workers, sum(len(graph.segments) for graph in graphs))
    header = 0
    if config.export_format == "tflite":
        names = {graph.role: sizes.file_name("tflite", graph.role) for graph in graphs}
        header = max(files[name] - sizes.stored_bytes("tflite", values[role]) for role, name in names.items())
    writing = _PROCESS_BYTES + _HEADER_COPIES * header + _FLIGHT_BYTES * _processors()
    return max(_PROCESS_BYTES * (1 + workers), writing)


def _seconds(
    config: ExportConfig,
    graphs: Sequence[TracedGraph],
    values: Mapping[str, Mapping[str, Parameter]],
    input_bytes: int,
    files: Mapping[str, int],
) -> dict[str, float]:
    """Seconds by stage, as an export names them."""
    segments = sum(len(graph.segments) for graph in graphs)
    count = sum(math.prod(parameter.shape) for part in values.values() for parameter in part.values())
    container = sum(size for name, size in files.items() if name.endswith(".litertlm"))
    return {
        "trace": _TRACE_S,
        "lower": round(_START_S + segments * _SEGMENT_S[config.export_format] / config.workers, 1),
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


def _device(
    config: ExportConfig, spec: TargetSpec, shape: GraphShape, values: Mapping[str, Mapping[str, Parameter]]
) -> Device:
    of_role = {role: sizes.stored_bytes(config.export_format, values[role]) for role in GRAPH_ROLES}
    caches = sum(math.prod(spec.cache_shape(i, shape.cache_length)) for i in range(spec.num_caches))
    return Device(
        weights_bytes=of_role["target"] + of_role["drafter"],
        table_bytes=of_role["embedder"] + of_role["per_layer_embedder"],
        kv_cache_bytes=2 * caches * _FLOAT_BYTES,
        logits_bytes=(shape.num_draft_tokens + 1) * spec.vocab_size * _FLOAT_BYTES,
    )
