"""What one pass of a graph takes on the GPU, signature by signature.

Each signature is loaded in a process of its own, from a file without the others: LiteRT's API uploads the weights again
for each. A few load side by side, and are then timed one after another. Composites are taken apart: LiteRT 2.3.0 ends
with a segmentation fault on any of them (docs/tried.md), so what passes take here is with every operator of a norm.
"""

from __future__ import annotations

import copy
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import flatbuffers
import numpy as np

from mtp_export.delegation import Graph, open_graph
from mtp_runtime.contract import PARAM_TENSOR, param_tensor

_AT_ONCE = 6  # each takes up to three times the weights in memory while it loads, and once on the disk
_WARM_UP, _REPEATS = 10, 30


def time_passes(
    wanted: Sequence[tuple[str, Path, str]], *, activations: str, folder: Path
) -> dict[str, dict[str, float]]:
    """What loading takes, and the median time of a pass, in ms, with its hidden state read back, without which it is
    not known to be over, and with that and its logits; by the first of (label, graph, signature)."""
    found: dict[str, dict[str, float]] = {}
    graphs = {path: open_graph(path) for path in {path for _, path, _ in wanted}}
    for start in range(0, len(wanted), _AT_ONCE):
        with tempfile.TemporaryDirectory(prefix="passes-", dir=folder) as place:
            files: dict[str, Path] = {}
            for label, path, name in wanted[start : start + _AT_ONCE]:
                files[label] = Path(place) / f"{len(files)}.tflite"
                write_alone(graphs[path], path, name, files[label])
            found |= _time_files(files, activations)
    return found


def _time_files(files: Mapping[str, Path], activations: str) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "tools.gpu_check.passes"]
    running = {
        label: subprocess.Popen([*command, str(path), activations], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for label, path in files.items()
    }
    try:
        while not all(files[label].with_suffix(".ready").exists() or p.poll() for label, p in running.items()):
            time.sleep(0.1)
        for label, process in running.items():
            process.communicate()  # the end of its input is the sign to start
            if process.returncode:
                raise RuntimeError(f"{label}: its process ended with code {process.returncode}")
    finally:
        for process in running.values():
            process.kill()
    return {label: json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) for label, path in files.items()}


def write_alone(graph: Graph, path: Path, name: str, output: Path) -> None:
    """A graph file with one of its signatures: the weights stay where they are in the file, behind a shorter header."""
    model = type(graph.model)()
    model.__dict__.update(graph.model.__dict__)
    entry = next(entry for entry in graph.model.signatureDefs if entry.signatureKey.decode() == name)
    signature = type(entry)()
    signature.__dict__.update(entry.__dict__)
    signature.subgraphIndex = 0
    model.subgraphs, model.signatureDefs = [taken_apart(graph, entry.subgraphIndex)], [signature]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    header = bytes(builder.Output())
    first = min(buffer.offset for buffer in graph.model.buffers if buffer.offset)
    if len(header) > first:
        raise AssertionError(f"{path.name}: the header of {name} alone is longer than that of all")
    shutil.copyfile(path, output)
    with output.open("r+b") as file:
        file.write(header)


def taken_apart(graph: Graph, number: int) -> Any:
    """A subgraph with the parts of each composite in its place."""
    whole, parts = copy.copy(graph.model.subgraphs[number]), graph.parts()
    whole.tensors, whole.operators = list(whole.tensors), []
    for index, operator in enumerate(graph.model.subgraphs[number].operators):
        if (number, index) not in parts:
            whole.operators.append(operator)
            continue
        part = graph.model.subgraphs[parts[number, index]]
        places = dict(enumerate(range(len(whole.tensors), len(whole.tensors) + len(part.tensors)))) | {-1: -1}
        places |= {int(theirs): int(ours) for theirs, ours in zip(part.inputs, operator.inputs, strict=True)}
        places |= {int(theirs): int(ours) for theirs, ours in zip(part.outputs, operator.outputs, strict=True)}
        whole.tensors += part.tensors
        for inner in part.operators:
            new = copy.copy(inner)
            new.inputs = np.array([places[int(i)] for i in inner.inputs], np.int32)
            new.outputs = np.array([places[int(i)] for i in inner.outputs], np.int32)
            whole.operators.append(new)
    return whole


def _main(path: Path, activations: str) -> None:
    from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, GpuOptions, HardwareAccelerator, Options

    options = Options(
        hardware_accelerators=HardwareAccelerator.GPU,
        cpu_options=CpuOptions(num_threads=1),
        gpu_options=GpuOptions(enforce_f32=activations == "fp32"),
    )
    started = time.perf_counter()
    model = CompiledModel.from_file(str(path), options=options)
    load_ms = round(1000.0 * (time.perf_counter() - started), 1)
    if not model.is_fully_accelerated():
        raise RuntimeError(f"{path.name} is not wholly delegated")
    path.with_suffix(".ready").touch()
    sys.stdin.read()
    path.with_suffix(".json").write_text(json.dumps({"load_ms": load_ms, **_time(model)}), encoding="utf-8")


def _time(model: Any) -> dict[str, float]:
    ((name, signature),) = model.get_signature_list().items()
    inputs = {key: model.create_input_buffer_by_name(name, key) for key in signature["inputs"]}
    outputs = {key: model.create_output_buffer_by_name(name, key) for key in signature["outputs"]}
    details = model.get_input_tensor_details(name)
    for key, buffer in inputs.items():
        buffer.write(_value(key, tuple(details[key]["shape"])))
    sizes = {key: int(np.prod(found["shape"])) for key, found in model.get_output_tensor_details(name).items()}
    hidden = next((key for key in sizes if key.endswith("activations")), min(sizes, key=sizes.__getitem__))
    read = {"pass_ms": [hidden], "with_logits_ms": [hidden, "logits"]}
    times: dict[str, list[float]] = {}
    for kind, keys in read.items():
        if not sizes.keys() >= set(keys):  # prefill has no logits
            continue
        for number in range(_WARM_UP + _REPEATS):
            started = time.perf_counter()
            model.run_by_name(name, inputs, outputs)
            for key in keys:
                outputs[key].read(sizes[key], np.float32)
            if number >= _WARM_UP:
                times.setdefault(kind, []).append(1000.0 * (time.perf_counter() - started))
    return {kind: round(statistics.median(taken), 3) for kind, taken in times.items()}


def _value(key: str, shape: tuple[int, ...], filled: int = 500) -> Any:
    """What a pass is fed after so many tokens; hidden states and caches at random."""
    if key == "input_pos":
        return np.arange(filled, filled + shape[0], dtype=np.int32)
    if key == PARAM_TENSOR:  # what reads it is taken apart
        return param_tensor(filled, filled + 1)
    if key == "mask":
        seen = np.arange(shape[-1]) <= filled + np.arange(shape[-2])[:, None]
        return np.broadcast_to(np.where(seen, 0.0, -1e4), shape).astype(np.float32)
    return np.random.default_rng(0).standard_normal(shape, dtype=cast(Any, np.float32))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2])
