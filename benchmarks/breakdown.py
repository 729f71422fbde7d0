"""What decode and verify of an ONNX pair spend their time on: by part of the model, from ONNX Runtime's own profile.

    python -m benchmarks.breakdown BUNDLE [--threads 2] [--filled 500] [--json]

LiteRT's wheel has no profiler. Times within a pass are sums over its nodes; the profile itself costs some of `rest`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from mtp_runtime import Bundle, Session
from mtp_runtime.backends.onnx.backend import OnnxBackend
from mtp_runtime.backends.onnx.opening import open_graph, open_session, pooled_options
from mtp_runtime.backends.packed_weights import PackedWeights
from mtp_runtime.measure.timing import filled_prompt

REPEATS = 12
# By the weight that a node reads, then by its operation: the first that is found in its name or among its inputs.
PARTS = (
    ("MLP", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "/mlp/Gelu")),
    ("projections of attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ("attention itself", ("GroupQueryAttention",)),
    ("per-layer embeddings", ("per_layer_model_projection", "per_layer_input_gate", "per_layer_projection")),
    ("head", ("/head/MatMul",)),
    ("norms", ("RMSNormalization",)),
)


def main() -> int:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--filled", type=int, default=500)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes, events = profile(options.bundle, options.threads, options.filled, Path(folder))
    matrices = weights_of(options.bundle / "target.onnx")
    passes = {name: breakdown(runs, matrices) for name, runs in by_pass(events, sizes).items()}
    if options.json:
        print(json.dumps(passes))
        return 0
    for name, parts in passes.items():
        total = sum(parts.values())
        print(f"{name}: {total:.1f} ms")
        for part, ms in sorted(parts.items(), key=lambda item: -item[1]):
            print(f"  {part:26} {ms:8.2f} ms  {ms / total:5.1%}")
    return 0


def profile(bundle: Path, threads: int, filled: int, folder: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """Run decode and verify in turn; return the numbers of tokens of the last passes in their order, and the events."""
    opened: list[ort.InferenceSession] = []

    def open_profiled(path: Path, threads: int, packed: PackedWeights | None = None) -> ort.InferenceSession:
        if path.name != "target.onnx":
            return open_graph(path, threads, packed)
        options = pooled_options(threads)
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "target")
        opened.append(open_session(path, options))
        return opened[0]

    source = Bundle.open(bundle, verify=False)
    with Session(source, OnnxBackend.open(source, threads=threads, open_graph=open_profiled)) as session:
        prompt = filled_prompt(session, filled)
        session.backend.prefill(prompt)
        sizes = [1, session.manifest.num_draft_tokens + 1] * REPEATS
        for size in sizes:
            session.backend.verify(prompt[:size])
        events: list[dict[str, Any]] = json.loads(Path(opened[0].end_profiling()).read_text())
    return sizes, events


def weights_of(path: Path) -> dict[str, str]:
    """Return the inputs of every node of a graph, as one text by the node's name."""
    graph = onnx.load(path, load_external_data=False).graph
    return {node.name: " ".join((node.op_type, *node.input)) for node in graph.node}


def by_pass(events: Iterable[dict[str, Any]], sizes: list[int]) -> dict[str, list[list[dict[str, Any]]]]:
    """Return the nodes' events of each of the last passes, by kind; the first of a kind warms up and is left out."""
    events = sorted(events, key=lambda event: event["ts"])
    runs = [event for event in events if event["name"] == "model_run"][-len(sizes) :]
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    by_name: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for run, size in zip(runs, sizes, strict=True):
        inside = [node for node in nodes if run["ts"] <= node["ts"] < run["ts"] + run["dur"]]
        by_name["decode" if size == 1 else f"verify_{size}"].append(inside)
    return {name: kinds[1:] for name, kinds in by_name.items()}


def breakdown(runs: list[list[dict[str, Any]]], matrices: dict[str, str]) -> dict[str, float]:
    """Median milliseconds of every part."""
    taken: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        sums: dict[str, float] = dict.fromkeys([*(part for part, _ in PARTS), "rest"], 0.0)
        for event in run:
            name = event["name"].removesuffix("_kernel_time")
            text = f"{name} {event['args'].get('op_name', '')} {matrices.get(name, '')}"
            sums[next((part for part, words in PARTS if any(word in text for word in words)), "rest")] += event["dur"]
        for part, micros in sums.items():
            taken[part].append(micros / 1000.0)
    return {part: round(statistics.median(times), 3) for part, times in taken.items()}


if __name__ == "__main__":
    sys.exit(main())
