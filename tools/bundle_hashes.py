"""Hashes of every bundle of nano: what a change of the code alone must leave as it was.

    python -m tools.bundle_hashes before.json              export all, write their hashes
    python -m tools.bundle_hashes before.json --compare    export all, print what differs from the file, exit 1 if any

Segments are converted anew, in a cache of their own. Takes some 6 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mtp_export.arch.published import NANO
from mtp_export.weights.recipes import RECIPES

FORMS = (
    ("--target", "tflite"),
    ("--target", "tflite", "--delegate", "gpu"),
    ("--target", "onnx"),
)
# These change the graphs, whatever the recipe.
VARIANTS = (
    ("--target", "tflite", "--delegate", "gpu", "--composites", "--recipe", "int8"),
    ("--target", "tflite", "--cache-length", "200", "--num-draft-tokens", "2", "--recipe", "int4"),
    ("--target", "tflite", "--rings", "512", "--recipe", "int8"),
    ("--target", "tflite", "--rings", "off", "--recipe", "int8"),
    ("--target", "tflite", "--drafter-position-offset", "0", "--centroid-top-k", "8", "--recipe", "int8"),
    ("--target", "onnx", "--portable", "--recipe", "int8"),
    ("--target", "onnx", "--batch-size", "4", "--recipe", "int4"),
)


def bundle_hashes(folder: Path) -> dict[str, dict[str, str]]:
    """Export each bundle into `folder` and return the SHA-256 of each of its files, by its options."""
    hashes = {}
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    plain = ((*form, "--recipe", recipe) for recipe, form in itertools.product(RECIPES, FORMS))
    for number, options in enumerate((*plain, *VARIANTS)):
        output = folder / str(number)
        command = [sys.executable, "-m", "mtp_export", "export", "--model", NANO.name, "--output", str(output)]
        subprocess.run([*command, *options], check=True, env=environment, stdout=subprocess.DEVNULL)
        files = sorted(path for path in output.rglob("*") if path.is_file())
        hashes[" ".join(options)] = {
            str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }
        print(f"{number + 1}: {' '.join(options)}: {len(files)} files", flush=True)
    return hashes


def differences(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """Return one line for each file that is not what it was."""
    lines = []
    for options in sorted(before.keys() | now.keys()):
        old, new = before.get(options, {}), now.get(options, {})
        lines += [f"{options}: {name}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hashes = bundle_hashes(Path(folder))
    if not arguments.compare:
        arguments.file.write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
        return
    lines = differences(json.loads(arguments.file.read_text(encoding="utf-8")), hashes)
    print("\n".join(lines) or f"{len(hashes)} bundles, all as before")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
