"""E2B or E4B at full size, from a synthetic checkpoint to rounds with drafts: time, memory, sizes and speed.

    python -m benchmarks.real_size --model e2b|e4b --target tflite|onnx [--recipe int4] [--depth 1/8] [--keep]
                                   [--finetune]

Synthesises the pair (kept in the folder for the next run), plans and exports it, opens it twice in the reference
runtime, runs it with drafts on and off, and runs a TFLite pair in stock LiteRT-LM likewise; of an ONNX pair it says
what a pass spends its time on. With `--finetune` the target is what a fine-tuner has: the published layout with its
towers, Unsloth's keys in config.json, and a LoRA adapter of text and vision beside it. Needs some 30 GB of disk for E2B
and 45 for E4B. Goals: at most 1.5 GiB of anonymous memory, 120 s for E2B and 240 s for E4B; equal output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks import export_cost
from benchmarks.machine import ROOT, write_result
from mtp_export.check.stock_runtime import StockRequest, run_stock
from mtp_runtime import Bundle

GOAL_BYTES = 3 << 29
GOAL_S = {"e2b": 120.0, "e4b": 240.0}
PROMPT = "def add(a, b):\n    return"


def main() -> int:
    """Run all steps, print and write the result; return 1 if an output differs or a goal of the export is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(GOAL_S), default="e2b")
    parser.add_argument("--target", choices=("tflite", "onnx"), default="tflite")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--depth", default="1", help="fraction of the target's layers")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "real_size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep the exported bundle in the folder")
    parser.add_argument("--finetune", action="store_true", help="with towers, Unsloth's keys and an adapter")
    options = parser.parse_args()
    figures = measure(options)
    print(json.dumps(figures, indent=1))
    name = f"real_size_{options.model}_{options.target}_{options.recipe}{'_finetune' if options.finetune else ''}"
    if Fraction(options.depth) == 1:
        print(f"written: {write_result(name, figures)}")
    within = figures["export"]["wall_s"] <= GOAL_S[options.model]
    within = within and figures["export"]["peak_anonymous_bytes"] <= GOAL_BYTES
    return 0 if within and figures["rounds"]["same_output"] and figures.get("stock", {}).get("same_text", True) else 1


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one model, format and recipe."""
    depth = options.depth.replace("/", "_of_")
    pair = options.folder / f"{options.model}-{depth}{'-finetune' if options.finetune else ''}"
    kind = ("--towers", "--leftovers", "unsloth", "--adapter") if options.finetune else ()
    bundle = options.folder / f"{pair.name}-{options.target}-{options.recipe}"
    figures: dict[str, Any] = {
        name: getattr(options, name) for name in ("model", "target", "recipe", "depth", "threads", "finetune")
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    if not pair.exists():
        started = time.perf_counter()
        run("tools.synthesize", "--model", options.model, "--depth", options.depth, "--output", str(pair), *kind)
        figures["synthesize_s"] = round(time.perf_counter() - started, 1)
    program = [str(Path(sys.executable).parent / "mtp-export")]
    if options.depth != "1":
        program = [sys.executable, "-m", "benchmarks.shallow"]
    arguments = [
        *("--model", options.model, "--target", options.target, "--recipe", options.recipe),
        *("--checkpoint", str(pair / "target"), "--drafter", str(pair / "drafter"), "--output", str(bundle)),
        *(("--adapter", str(pair / "adapter")) if options.finetune else ()),
        *("--force", "--json"),
    ]
    plan = json.loads(subprocess.run([*program, "plan", *arguments], stdout=subprocess.PIPE, check=True).stdout)
    with tempfile.TemporaryDirectory(dir=options.folder) as cache:  # nothing is converted or packed yet
        os.environ["XDG_CACHE_HOME"] = cache
        try:
            figures["left_aside"] = plan["left_aside"]
            figures["export"] = export_cost.run([*program, "export", *arguments])
            sizes = {path.name: path.stat().st_size for path in bundle.iterdir()}
            figures["planned_over_written"] = round(sum(plan["files_bytes"].values()) / sum(sizes.values()), 4)
            figures["rounds"] = rounds(bundle, options.threads)
            figures["second_start"] = rounds(bundle, options.threads, "--start-only")
            if options.target == "tflite":
                figures["stock"] = stock(bundle, options.threads)
            else:
                parts = run("benchmarks.breakdown", str(bundle), "--threads", str(options.threads), "--json")
                figures["parts_ms"] = json.loads(parts)
        finally:
            if not options.keep:
                shutil.rmtree(bundle, ignore_errors=True)
    return figures


def run(module: str, *arguments: str) -> str:
    """Run a module of this project and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    ).stdout


def rounds(bundle: Path, threads: int, *more: str) -> dict[str, Any]:
    """Return what `benchmarks.rounds` says of a bundle, whether outputs were the same or not."""
    command = [sys.executable, "-m", "benchmarks.rounds", str(bundle), "--threads", str(threads), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(f"the rounds failed with exit code {done.returncode}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def stock(folder: Path, threads: int) -> dict[str, Any]:
    """Run the `.litertlm` in stock LiteRT-LM without MTP and with it."""
    with Bundle.open(folder, verify=False) as bundle:
        path, length = bundle.path("litertlm"), bundle.manifest.context_length
    plain, mtp = (
        run_stock(
            StockRequest(
                model_path=str(path),
                prompts=[PROMPT],
                max_new_tokens=32,
                context_length=length,
                use_mtp=use_mtp,
                threads=threads,
            )
        )
        for use_mtp in (False, True)
    )
    texts = [done.outputs[0].text for done in (plain, mtp)]
    shortest = min(map(len, texts))  # with MTP, the last round is said whole
    return {
        "same_text": shortest > 0 and texts[0][:shortest] == texts[1][:shortest],
        "tokens_per_second": {"plain": round(plain.tokens_per_second, 2), "mtp": round(mtp.tokens_per_second, 2)},
    }


if __name__ == "__main__":
    sys.exit(main())
