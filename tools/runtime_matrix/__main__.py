"""nano's bundle in several versions of stock LiteRT-LM, each installed into an environment of its own.

python -m tools.runtime_matrix [--output docs/runtime-matrix.md] [VERSION…]

Exports nano with this commit and with an older one, runs probe.py with each version on both, drafts off and on, and
writes a table; with this commit's also contexts, rings and texts taken back (contexts.py). Takes about fifteen minutes;
needs a package registry and the history of the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtp_runtime.measure.parity import common_length
from tools.runtime_matrix.contexts import RING, Runs

ROOT = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("probe.py")
# The newest stable version that is in the registry, and the newest nightly: 0.19 is not there as a stable one.
VERSIONS = ("litert-lm-api==0.18.1", "litert-lm-api-nightly==0.19.0.dev20261026")
OLDER = "c6c73d1"  # before templates were written for the runtime
_MODES = ("ON", "ADAPTIVE")
_LONGEST_S = 600  # a probe takes a minute
_WHOLE = "the whole"  # the check that a version has which fails as a whole


def main() -> None:
    """Run every version on both bundles and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="requirements, as pip takes them")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/runtime-matrix.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="runtime-matrix-") as folder:
        work = Path(folder)
        commit = _git("rev-parse", "--short=7", "HEAD")
        with _worktree(OLDER, work / "older") as older:
            bundles = {commit: _exported(ROOT, work / "now"), OLDER: _exported(older, work / "before")}
        rings = {length: _exported(ROOT, work / f"rings-{length}", "--rings", length) for length in ("off", str(RING))}
        results = {}
        for version in options.versions:
            python = _installed(version, work)
            for name, bundle in bundles.items():
                print(f"{version} on the bundle of {name}", file=sys.stderr, flush=True)
                results[version, name] = _probed(python, bundle, work / "answer.json")
            by_mode = results[version, commit]
            if _WHOLE in by_mode["OFF"]:
                continue
            print(f"{version} at contexts", file=sys.stderr, flush=True)
            runs = Runs(python=python, without=rings["off"], with_rings=rings[str(RING)], work=work)
            for check, by_name in runs.lines(list(by_mode)).items():
                for mode, result in by_name.items():
                    by_mode[mode][check] = result
        options.output.write_text(_page(results), encoding="utf-8")
    print(f"written: {options.output}")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def _worktree(commit: str, folder: Path) -> Iterator[Path]:
    """A commit's files in a folder of their own, which the repository knows only so long."""
    _git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _exported(checkout: Path, output: Path, *further: str) -> Path:
    """nano's float bundle, by the code of a checkout, with further options."""
    paths = os.pathsep.join(str(checkout / part) for part in ("converter", "runtime_py", "calibration"))
    # `main` is a function of `cli` in the older commit, and a module of it now.
    code = "from mtp_export.cli import main; getattr(main, 'main', main)()"
    options = ["export", "--model", "nano", "--target", "tflite", "--recipe", "f32", "--output", str(output), *further]
    environment = {**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(output) + "-cache"}
    subprocess.run([sys.executable, "-c", code, *options], check=True, env=environment, stdout=subprocess.DEVNULL)
    return output / "nano.litertlm"


def _installed(version: str, work: Path) -> Path:
    """Return the interpreter of an environment with one version of the runtime."""
    folder = work / version.replace("=", "-")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(folder / "bin/pip"), "install", "--quiet", version], check=True)
    return folder / "bin/python"


def _probed(python: Path, bundle: Path, answer: Path) -> dict[str, dict[str, Any]]:
    command = [str(python), str(PROBE), str(bundle), str(answer)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        return _failed(f"no end within {_LONGEST_S} s")
    if done.returncode != 0:
        return _failed(f"exit {done.returncode}: {done.stderr.strip()[-200:]}")
    results: dict[str, dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
    answer.unlink()
    return results


def _failed(error: str) -> dict[str, dict[str, Any]]:
    return {"OFF": {_WHOLE: {"error": " ".join(error.split())}}}


def _page(results: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    lines = [
        "# Versions of LiteRT-LM",
        "",
        "Made by `python -m tools.runtime_matrix`: nano's float bundle, on the CPU, drafts off and on, in each "
        "version. *Equal*: what drafts give is what plain decoding gives, text by text and token held by token held. "
        "What the lines mean for an app is in [litert-lm.md](litert-lm.md).",
        "",
        f"On {platform.machine()}, Python {platform.python_version()}; bundles of "
        + " and ".join(dict.fromkeys(name for _, name in results)),
        "",
    ]
    for (version, name), by_mode in results.items():
        modes = [mode for mode in _MODES if mode in by_mode]
        lines += [f"## {version}, bundle of {name}", ""]
        lines += [f"| | plain | {' | '.join(f'drafts {mode}' for mode in modes)} |", "|---" * (len(modes) + 2) + "|"]
        for check, plain in by_mode["OFF"].items():
            cells = [_cell(check, by_mode[mode].get(check), plain) for mode in modes]
            lines.append(f"| {check} | {_plain(check, plain)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _error(result: Any) -> str | None:
    return result["error"].replace("|", "/") if isinstance(result, dict) and "error" in result else None


def _plain(check: str, result: Any) -> str:
    if error := _error(result):
        return f"fails: {error}"
    if check == "sampling":
        return f"{len(result)} beginnings of {sum(result.values())}"
    if isinstance(result, dict):
        return ", ".join(f"{key} {value}" for key, value in result.items())
    return "works"


def _cell(check: str, result: Any, plain: Any) -> str:
    if _error(result):
        return _plain(check, result)
    if check == "sampling" and not _error(plain):
        return f"{_plain(check, result)}, distance {_distance(result, plain):.2f}"
    if result == plain:
        return "equal"
    return _plain(check, result) if isinstance(result, dict) else f"DIFFERENT: {_first_difference(result, plain)}"


def _distance(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """Total variation between two counts."""
    of_one, of_other = sum(one.values()), sum(other.values())
    return 0.5 * sum(abs(one.get(t, 0) / of_one - other.get(t, 0) / of_other) for t in {*one, *other})


def _first_difference(result: Any, plain: Any) -> str:
    if isinstance(result, Sequence) and not isinstance(result, str) and isinstance(plain, Sequence):
        place = common_length(result, plain)
        if place < min(len(result), len(plain)):
            return _first_difference(result[place], plain[place])
    return f"{json.dumps(result, ensure_ascii=False)} in place of {json.dumps(plain, ensure_ascii=False)}"[:160]


if __name__ == "__main__":
    main()
