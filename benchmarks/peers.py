"""Ours beside others on nano, in one run: stock LiteRT-LM without and with MTP on the same bundle, and what is given.

    python -m benchmarks.peers [--threads 1] [--openvino PYTHON] [--llama-cpp PYTHON --gguf GGUF] [--mobius MODEL.onnx]

Every runtime continues the same prompts greedily, in turn, for some rounds; figures are medians over rounds of tokens
per second after each prompt's first token (stock LiteRT-LM: of its whole decode call). What a peer needs is not
installed here; it lies in a folder of its own:

    python -m venv peers && peers/bin/pip install openvino==2026.4.1 llama-cpp-python==0.3.36 mobius-onnx==0.1.0 \\
        torch transformers==5.10.2

* GGUF: what llama.cpp's `convert_hf_to_gguf.py --outtype q8_0` makes of `converter/mtp_export/nano/target`; it comes in
  the source of llama-cpp-python, under vendor/llama.cpp.
* MODEL.onnx: what `python -m mobius build --dtype f32` makes of a copy of that folder whose config.json is its own
  `text_config` (with tie_word_embeddings, and architectures Gemma4ForCausalLM).
* OpenVINO runs single passes: it reads the target of a `--portable` f32 export, whose passes in ONNX Runtime stand
  beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bundles import exported
from benchmarks.machine import ROOT, write_result
from mtp_export.check.prompts import heldout_prompts, of_kind
from mtp_export.check.stock_runtime import StockRequest, run_stock
from mtp_runtime import Session
from mtp_runtime.backends.onnx.backend import OnnxBackend
from mtp_runtime.backends.onnx.graphs import OnnxGraphs
from mtp_runtime.generate.stats import overall_tokens_per_second
from mtp_runtime.measure.parity import common_length, common_pieces
from mtp_runtime.measure.timing import filled_prompt

SCRIPTS = ROOT / "benchmarks"
CACHE_LENGTH, FILLED = 1024, 500
# What was tried in vain, for the shapes of nano.
LEFT_OUT = {
    "OpenVINO 2026.4.1, our other files": "it refuses com.microsoft.GroupQueryAttention with keys of no tokens, and "
    ".tflite files whose weights lie behind the flatbuffer",
    "mobius-onnx 0.1.0, as published": "a config of model_type gemma4 needs a vision tower, which nano has not; with "
    "transformers 5.22.2 it fails (head_dim is a per-layer attribute)",
    "mobius-onnx 0.1.0, MTP": "its drafter is fed the target's last hidden state, and its target gives out logits and "
    "caches alone",
    "llama.cpp, MTP": "llama-cpp-python 0.3.36 drafts by looking up the prompt; it has no call for a drafter over the "
    "target's cache",
}


def main() -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--openvino", type=Path, metavar="PYTHON")
    parser.add_argument("--llama-cpp", type=Path, metavar="PYTHON")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--mobius", type=Path, metavar="MODEL.onnx")
    options = parser.parse_args()
    prompts = [prompt.text for prompt in of_kind(heldout_prompts(), "code")][: options.prompts]
    rows = generation(options, prompts)
    figures: dict[str, Any] = {
        **{name: getattr(options, name) for name in ("threads", "new_tokens", "repeats")},
        "prompts": len(prompts),
        "generation": rows,
        "left_out": LEFT_OUT,
    }
    if options.openvino:
        figures["passes_f32"] = passes_beside_openvino(options.openvino, options.threads)
    print(json.dumps(figures, indent=1))
    print(f"written: {write_result('peers', figures)}")
    return 0


class _Table:
    """Speeds by runtime, and how far its outputs are those of the reference: our LiteRT backend without drafts."""

    def __init__(self) -> None:
        self.speeds: dict[tuple[str, str, str, int], list[float]] = {}
        self.common: dict[tuple[str, str, str, int], float] = {}

    def add(self, key: tuple[str, str, str, int], speed: float, common: Sequence[int]) -> None:
        self.speeds.setdefault(key, []).append(speed)
        self.common[key] = statistics.mean(common)

    def rows(self, warm_up: int) -> list[dict[str, Any]]:
        return [
            {
                "runtime": key[0],
                "version": key[1],
                "weights": key[2],
                "num_draft_tokens": key[3],
                "tokens_per_second": round(statistics.median(speed[warm_up:]), 1),
                "leading_tokens_in_common": round(self.common[key], 1),
            }
            for key, speed in self.speeds.items()
        ]


def generation(options: argparse.Namespace, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Return tokens per second of every runtime, in turn; the first time round warms up."""
    table, count = _Table(), options.new_tokens
    with (
        Session.open(exported(CACHE_LENGTH, "int8"), threads=options.threads) as litert,
        Session.open(exported(CACHE_LENGTH, "int8", "onnx"), threads=options.threads) as onnx,
    ):
        ids = [litert.tokenize(prompt) for prompt in prompts]
        expected = [litert.generate(i, max_new_tokens=count, num_draft_tokens=0).finish().tokens for i in ids]
        pieces = [litert.text_pieces(tokens) for tokens in expected]
        for _ in range(1 + options.repeats):
            for k in (0, 4):
                for name, package, session in (
                    ("mtp_runtime, LiteRT", "ai-edge-litert", litert),
                    ("mtp_runtime, ONNX Runtime", "onnxruntime", onnx),
                ):
                    traces = [session.generate(i, max_new_tokens=count, num_draft_tokens=k).finish() for i in ids]
                    speed = overall_tokens_per_second([trace.stats for trace in traces]) or 0.0
                    outputs = [trace.tokens for trace in traces]
                    table.add((name, version(package), "int8", k), speed, _in_common(outputs, expected))
                run = run_stock(
                    StockRequest(
                        model_path=str(litert.bundle.path("litertlm")),
                        prompts=prompts,
                        max_new_tokens=count,
                        context_length=litert.manifest.context_length,
                        use_mtp=k > 0,
                        threads=options.threads,
                    )
                )
                common = [common_pieces(p, o.text) for o, p in zip(run.outputs, pieces, strict=True)]
                table.add(("LiteRT-LM", version("litert-lm-api"), "int8", k), run.tokens_per_second, common)
            for name, weights, command in _peers(options):
                result = _run([*command, options.threads, count], request=ids)
                tokens = sum(len(output["tokens"]) - 1 for output in result["outputs"])
                speed = 1000.0 * tokens / sum(output["ms"] for output in result["outputs"])
                outputs = [output["tokens"] for output in result["outputs"]]
                table.add((name, result["version"], weights, 0), speed, _in_common(outputs, expected))
    return table.rows(warm_up=1)


def _peers(options: argparse.Namespace) -> list[tuple[str, str, list[object]]]:
    """Name, weights and command of the peers that were given."""
    peers: list[tuple[str, str, list[object]]] = []
    if options.llama_cpp:
        peers.append(("llama.cpp", "q8_0", [options.llama_cpp, SCRIPTS / "peer_llama_cpp.py", options.gguf]))
    if options.mobius:
        peers.append(("mobius-onnx", "f32", [sys.executable, SCRIPTS / "peer_mobius.py", options.mobius]))
    return peers


def _in_common(outputs: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> list[int]:
    """Return how many leading tokens of each output are the expected ones."""
    return [common_length(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True)]


def passes_beside_openvino(python: Path, threads: int) -> dict[str, Any]:
    """Milliseconds of passes over 1 and 5 tokens with 500 positions filled: the same file, the same inputs."""
    bundle = ROOT / "build" / f"nano-onnx-portable-f32-{CACHE_LENGTH}"
    if not bundle.exists():
        command = [str(Path(sys.executable).with_name("mtp-export")), "--model", "nano", "--target", "onnx"]
        command += ["--portable", "--recipe", "f32", "--cache-length", str(CACHE_LENGTH), "--output", str(bundle)]
        subprocess.run(command, check=True)
    with tempfile.TemporaryDirectory() as folder, Session.open(bundle, threads=threads) as session:
        assert isinstance(session.backend, OnnxBackend)
        graphs, files, ours = session.backend.graphs, [], {}
        session.backend.prefill(filled_prompt(session, FILLED))
        for count in (1, 5):
            files.append(str(Path(folder) / f"tokens_{count}.npz"))
            ours[f"tokens_{count}"] = _pass_of_ours(session, graphs, count, Path(files[-1]))
        theirs = _run([python, SCRIPTS / "peer_openvino.py", bundle / "target.onnx", *files, threads])
    return {
        "OpenVINO": theirs["version"],
        "ONNX Runtime": version("onnxruntime"),
        "passes": {
            name: {
                "onnxruntime_ms": round(times["ms"], 3),
                "openvino_ms": round(theirs["passes"][name]["ms"], 3),
                "same_first_choices": times["first_choices"] == theirs["passes"][name]["first_choices"],
            }
            for name, times in ours.items()
        },
    }


def _pass_of_ours(session: Session, graphs: OnnxGraphs, count: int, file: Path) -> dict[str, Any]:
    """Time the graph alone in ONNX Runtime, and keep its inputs."""
    logits = session.backend.verify(filled_prompt(session, count))
    run = graphs.target_run(count, count, (0,))
    np.savez(file, **run.inputs)
    times = []
    for _ in range(23):
        started = _now()
        run.graph.run()
        times.append(_now() - started)
    return {"ms": statistics.median(times[3:]), "first_choices": logits.logits.argmax(-1).tolist()}


def _now() -> float:
    return 1000.0 * time.perf_counter()


def _run(command: Sequence[object], request: object = None) -> dict[str, Any]:
    """Run a peer's part, and read what it prints last."""
    done = subprocess.run(
        [str(part) for part in command], input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(main())
