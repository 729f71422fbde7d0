"""Passes of several bundles in turn, in the reference runtime: what a change of the graphs costs.

    python -m benchmarks.pass_times BUNDLE[@CONTEXT]... [--filled 500] [--repetitions 5] [--result NAME]

Each pass is timed in each bundle within seconds, and given as a ratio to that of the first bundle in the same
repetition: median, least and most. A bundle of an older version has one context, that of its export. Prefill is that
of all that is filled. With `--result` the figures are written, unless the load average was above 0.3 before.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from statistics import median
from typing import Any

from benchmarks.machine import spread, write_if_quiet
from mtp_runtime import Session
from mtp_runtime.measure.timing import filled_prompt, time_passes


def main() -> int:
    """Measure, print and write; return 1 if the machine was not quiet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE[@CONTEXT]")
    parser.add_argument("--filled", type=int, default=500)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--result", help="name of the result to write")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    times = measure(options)
    figures = {
        "filled": options.filled,
        "threads": options.threads,
        "load_before": round(load, 2),
        "ms": {name: {kind: round(median(values), 2) for kind, values in of.items()} for name, of in times.items()},
        "ratios": ratios(times),
    }
    print_figures(figures)
    return 0 if write_if_quiet(options.result, figures, load) else 1


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return the milliseconds of each pass by bundle, one of each repetition."""
    times: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        sessions = {}
        for name in options.bundles:
            path, _, context = name.partition("@")
            sessions[name] = stack.enter_context(
                Session.open(
                    path, threads=options.threads, verify=False, context_length=int(context) if context else None
                )
            )
        for _ in range(options.repetitions):
            for name, session in sessions.items():
                for kind, timing in time_passes(session, filled_prompt(session, options.filled)).items():
                    times.setdefault(name, {}).setdefault(kind, []).append(timing.median_ms)
    return times


def ratios(times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Return each bundle's times over those of the first, repetition by repetition."""
    first, *others = times.values()
    result: dict[str, dict[str, Any]] = {}
    for name, of in zip(list(times)[1:], others, strict=True):
        result[name] = {}
        for kind, values in of.items():
            result[name][kind] = spread([a / b for a, b in zip(values, first[kind], strict=True)])
    return result


def print_figures(figures: dict[str, Any]) -> None:
    """Print the times, and the ratios to the first bundle."""
    print(f"{figures['filled']} filled, {figures['threads']} threads; ms, and the ratio to the first bundle")
    for name, of in figures["ms"].items():
        for kind, ms in of.items():
            ratio = figures["ratios"].get(name, {}).get(kind)
            text = "" if ratio is None else f"  {ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"
            print(f"{name:50} {kind:10} {ms:9.2f}{text}")


if __name__ == "__main__":
    sys.exit(main())
