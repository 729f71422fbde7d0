"""python -m tools.gpu_check [probe] [equality] [speed] [onnx] [tests] [convert] [convert-onnx] [export]

On a machine with a GPU and a Vulkan driver: which operators its backend takes (the table that `mtp-export inspect`
reads), whether stock LiteRT-LM says there with drafts what it says without, and what passes, tokens and rounds take at
the sizes of E2B and E4B, in time and memory; and what ONNX Runtime's WebGPU provider does with the ONNX pair, which
takes `mtp-export[webgpu]`. Without a name, these four. `tests` runs the tests that need a GPU.

What is missing in FOLDER is exported there, 30 GB in all and as much again meanwhile, the full sizes while the first
checks run; `export` only does that. Where a machine has no converter, bring FOLDER/converted and FOLDER/*-onnx:
`convert` writes them where there is one, and `convert-onnx` the latter alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, ROOT
from mtp_export.check.prompts import heldout_prompts
from mtp_export.formats.tflite.gpu_table import COMPOSITE
from tools.gpu_check.converted import conversions
from tools.gpu_check.drafters import DRAFTERS
from tools.gpu_check.equality import check_equality
from tools.gpu_check.full_size import (
    BUNDLES,
    bundle,
    bundle_of_two_kv_heads,
    convert_all,
    suffix,
    write_full_size,
)
from tools.gpu_check.machine import described
from tools.gpu_check.onnx_bundles import write_onnx_bundles
from tools.gpu_check.probe import collect, run_probes, try_composites, write_probes
from tools.gpu_check.speed import check_speed

CHECKS = ("probe", "equality", "speed", "onnx")
STEPS = ("convert", "convert-onnx", "export", "tests", *CHECKS)
RECIPES = ("f32", "int8", "int4", "int4-block", "mobile", "mobile-plus")
EQUALITY_RECIPES = ("f32", "int8", "int4")
_ONNX_PROMPTS, _ONNX_TOKENS = 8, 64  # at most: a pass there is some thousand small operations, started one by one
TABLE = ROOT / "converter" / "mtp_export" / "formats" / "tflite" / "gpu_table.json"


def main() -> int:
    """Run what was named; return 1 if an output differs by more than a near-tie."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", choices=STEPS, default=list(CHECKS))
    parser.add_argument("--bundles", type=Path, default=ROOT / "build" / "gpu_check")
    parser.add_argument("--recipes", default=",".join(EQUALITY_RECIPES), help="for equality")
    parser.add_argument("--drafters", default=",".join(DRAFTERS), help="for equality")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--composites", action="store_true", help="equality and speed of bundles with composites")
    parser.add_argument("--models", default="e2b,e4b", help="for speed")
    parser.add_argument("--activations", default="fp16,fp32", help="for equality and speed")
    parser.add_argument("--commit", help="the commit that this code is of, where it has no history with it")
    options = parser.parse_args()
    code = 0
    models = options.models.split(",")
    with conversions(options.bundles / "converted"), ThreadPoolExecutor(1) as beside:
        if "convert" in options.checks:
            convert_all(models, composites=options.composites)
        if {"convert", "convert-onnx"} & set(options.checks):
            write_onnx_bundles(options.bundles)
        written = None
        if {"export", "speed"} & set(options.checks):
            written = beside.submit(
                lambda: [write_full_size(model, options.bundles, composites=options.composites) for model in models]
            )
        if "probe" in options.checks:
            probe(options)
        if "tests" in options.checks:
            environment = {**os.environ, BUNDLES: str(options.bundles.absolute())}
            command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/device/gpu"]
            code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if "equality" in options.checks:
            code = equality(options) or code
        if written is not None:
            written.result()
        if "speed" in options.checks:
            speed(options, models)
        if "onnx" in options.checks:
            code = onnx(options) or code
    return code


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def probe(options: argparse.Namespace) -> None:
    """Run an operator of each form of our graphs, and write the table."""
    recipes = [(recipe, "gpu") for recipe in RECIPES] + [(recipe, "cpu") for recipe in ("f32", "int8")]
    composed = [bundle(options.bundles, "f32", "gpu", composites=True), bundle_of_two_kv_heads(options.bundles)]
    folders = [*(bundle(options.bundles, *name) for name in recipes), *composed]
    forms = collect([path for folder in folders for path in sorted(folder.glob("*.tflite"))])
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder_of_probes:
        probed = {form: place for form, place in forms.items() if place[1].name != COMPOSITE}
        write_probes(probed, Path(folder_of_probes))
        rows = run_probes(Path(folder_of_probes))
    tried: dict[str, dict[str, Any]] = {}
    for folder in composed:
        for form, row in try_composites(folder).items():
            if tried.get(form, row)["delegated"]:  # a form that is refused once stays refused
                tried[form] = row
    rows += [tried[form] for form in sorted(tried)]
    write(TABLE, {**described(options.commit), "forms": rows})
    print(f"{len(rows)} forms, {sum(not row['delegated'] for row in rows)} refused")


def equality(options: argparse.Namespace) -> int:
    """Run nano with drafts and without, and write the result."""
    prompts = [prompt.text for prompt in heldout_prompts()][: options.prompts]
    rows: list[dict[str, Any]] = []
    for recipe in options.recipes.split(","):
        rows += check_equality(
            bundle(options.bundles, recipe, "gpu", composites=options.composites),
            prompts,
            max_new_tokens=options.max_new_tokens,
            drafters=options.drafters.split(","),
            kinds=options.activations.split(","),
            on_run=_say,
        )
        counts = {"prompts": len(prompts), "max_new_tokens": options.max_new_tokens}
        write(result("gpu_equality", options), {**described(options.commit), **counts, "runs": rows})
    for row in rows:
        verdicts = row["against_plain"]
        print(
            f"{row['recipe']:5} {row['activations']} drafter {row['drafter']:18} equal {verdicts['equal']:2} near-ties "
            f"{verdicts['near_ties']} different {verdicts['different']}; as the CPU {row['against_cpu']['equal']}; "
            f"acceptance {row['acceptance_rate']}"
        )
    return int(any(row["against_plain"]["different"] for row in rows))


def speed(options: argparse.Namespace, models: Sequence[str]) -> None:
    """Run the models with each kind of activations, and write the results after each."""
    kinds = options.activations.split(",")
    checks = {
        model: check_speed(model, options.bundles, kinds, _say, composites=options.composites) for model in models
    }
    for _ in kinds:
        for model, check in checks.items():
            figures = next(check)
            write(result(f"gpu_speed_{model}", options), {**described(options.commit), **figures})
            print(json.dumps(figures, indent=1))


def onnx(options: argparse.Namespace) -> int:
    """Run the ONNX pair, and write the result."""
    # Imported here: the other checks need neither onnx nor the provider.
    from tools.gpu_check.onnx import OnnxCheck, check_onnx

    prompts = [prompt.text for prompt in heldout_prompts()][: min(options.prompts, _ONNX_PROMPTS)]
    check = OnnxCheck(max_new_tokens=min(options.max_new_tokens, _ONNX_TOKENS))
    figures = check_onnx(options.bundles, prompts, check, _say)
    description = described(options.commit)
    description["versions"]["onnxruntime-ep-webgpu"] = version("onnxruntime-ep-webgpu")
    write(RESULTS / "gpu_onnx.json", {**description, **figures})
    print(json.dumps(figures, indent=1))
    return int(any(row["mtp_against_plain"]["different"] for row in figures["equality"]))


def result(name: str, options: argparse.Namespace) -> Path:
    return RESULTS / f"{name}{suffix(options.composites)}.json"


def write(path: Path, figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
