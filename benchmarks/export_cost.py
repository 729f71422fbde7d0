"""What an export takes: wall time, peak memory of all its processes, sizes.

    python -m benchmarks.export_cost [--recipe int8] [-- further options of mtp-export]

Memory is the sum over the export's processes of what is theirs alone plus their share of what is common (PSS),
sampled twice a second. Goal for nano: at most 90 s and 3 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import write_result

GOAL_S, GOAL_BYTES = 90.0, 3 << 30


def main() -> int:
    """Export, print and write the result; return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("further", nargs="*", help="further options of mtp-export")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # no segment is converted yet
        command = [str(Path(sys.executable).parent / "mtp-export"), "--model", options.model, "--target", "tflite"]
        command += ["--recipe", options.recipe, "--output", f"{folder}/bundle", "--json", *options.further]
        figures = run(command)
    print(json.dumps(figures, indent=1))
    print(f"written: {write_result(f'export_cost_{options.model}_{options.recipe}', figures)}")
    within = figures["wall_s"] <= GOAL_S and figures["peak_pss_bytes"] <= GOAL_BYTES
    return 0 if within or options.model != "nano" else 1


def run(command: list[str]) -> dict[str, Any]:
    """Run an export and watch its memory."""
    started, peak_pss, peak_anonymous = time.perf_counter(), 0, 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        taken = [memory_bytes(pid) for pid in family(process.pid)]
        peak_pss = max(peak_pss, sum(pss for pss, _ in taken))
        peak_anonymous = max(peak_anonymous, sum(anonymous for _, anonymous in taken))
        time.sleep(0.5)  # looking takes time itself
    wall_s = time.perf_counter() - started
    output = process.stdout.read() if process.stdout else ""
    if process.returncode != 0:
        raise SystemExit(f"the export failed with exit code {process.returncode}")
    return {
        "wall_s": round(wall_s, 1),
        "peak_pss_bytes": peak_pss,
        "peak_anonymous_bytes": peak_anonymous,
        "result": {k: v for k, v in json.loads(output).items() if k != "output"},
    }


def family(root: int) -> list[int]:
    """Return a process and all that it started."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            parents[int(status.parent.name)] = int(fields[1])
        except OSError:  # it has ended meanwhile
            continue
    processes = [root]
    for pid in processes:
        processes += [child for child, parent in parents.items() if parent == pid]
    return processes


def memory_bytes(pid: int) -> tuple[int, int]:
    """Return a process's share of what it has in memory (PSS), and of that, what no file stands behind."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended meanwhile
        return 0, 0
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in text.splitlines()[1:]}
    return sizes["Pss"], sizes["Pss_Anon"]


if __name__ == "__main__":
    sys.exit(main())
