"""What a large context costs in stock LiteRT-LM where little of it is filled: speed and memory, as ratios of one run.

    python -m benchmarks.stock_context [--models e2b e4b] [--repetitions 5] [--filled 60 500 7000 16000] [--bundle DIR]

Each pair is synthesised and exported at int4, unless `--bundle` gives a finished one; `--models nano` is a smoke test.
An engine for each allocated length, with drafts and without, stays open in a process of its own, and one more for each
long text, which takes too long to be filled in every repetition. All take turns within seconds, because the speed of
a machine changes by the minute. A drafter of synthetic weights drafts what the target refuses, so a round gives one
token: the worst case of MTP. Single passes are timed in the reference runtime, on the same graphs at the same lengths.

Goals: with 32000 slots allocated and 500 filled, prefill, decode, verify and draft take at most 1.05 times as long as
with 1024 allocated; decode with 16000 filled at most 2.5 times as long as with 500. A machine whose load average was
above 0.3 before is not quiet: the figures are printed, and called so, and no result is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.machine import QUIET_LOAD, ROOT, spread, write_if_quiet
from benchmarks.stock_engine import Answer, Settings, StockEngine
from mtp_runtime import Session, read_manifest
from mtp_runtime.measure.timing import filled_prompt, time_passes

ALLOCATED = (1024, 32000)
FILLED = (60, 500, 7000, 16000)
AT = 500  # filled, where allocated lengths are compared
LONG = 1000  # a text of more tokens is filled once, and decoded from in every repetition
GOAL_ALLOCATED, GOAL_FILLED = 1.05, 2.5
_MORE_THAN_NEW = 8  # tokens a turn: those of the last round, and one that is fed before it


def main() -> int:
    """Measure, print and write the result; return 1 if a goal is missed, texts differ or the machine was not quiet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("nano", "e2b", "e4b"), default=["e2b", "e4b"])
    parser.add_argument("--bundle", type=Path, help="a finished bundle instead of exported ones")
    parser.add_argument("--allocated", nargs=2, type=int, default=ALLOCATED, help="the short and the long context")
    parser.add_argument("--filled", nargs="+", type=int, default=FILLED)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=24, help="generated at a time")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "real_size", help="of synthesised pairs")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    met = True
    for name in ["bundle"] if options.bundle else options.models:
        bundle = options.bundle or exported(name, options.recipe, options.folder)
        figures = {"load_before": round(load, 2), "quiet": load <= QUIET_LOAD, **measure(bundle, options)}
        print_table(figures)
        met &= write_if_quiet(f"stock_context_{figures['model']}_{figures['recipe']}", figures, load)
        met &= figures["goals_met"] and figures["same_text"]
    return 0 if met else 1


def exported(model: str, recipe: str, folder: Path) -> Path:
    """Export a synthetic pair, which is made if it is not there, or nano, and return the bundle."""
    pair, bundle = folder / f"{model}-1", folder / f"{model}-context-{recipe}"
    checkpoints: list[str] = []
    if model != "nano":
        if not pair.exists():
            command = ["-m", "tools.synthesize", "--model", model, "--output", str(pair)]
            subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
        checkpoints = ["--checkpoint", str(pair / "target"), "--drafter", str(pair / "drafter")]
    command = ["-m", "mtp_export", "export", "--model", model, "--recipe", recipe, "--output", str(bundle)]
    command.append("--force")
    subprocess.run([sys.executable, *command, *checkpoints], check=True, cwd=ROOT)
    return bundle


def measure(bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one bundle."""
    manifest = read_manifest(bundle)
    short, long = options.allocated[0], min(options.allocated[1], manifest.longest_context_length)
    if long <= short:
        longest = (
            f"{manifest.longest_context_length} tokens" if manifest.chooses_context else "that of its export alone"
        )
        raise SystemExit(f"{bundle}: its longest context is {longest}, expected one above {short}: give another bundle")
    room = (1 + options.repetitions) * (options.new_tokens + _MORE_THAN_NEW)  # behind a text that is filled once
    cells = [(size, n) for size in (short, long) for n in sorted(options.filled) if n + room <= size]
    if not any(size == long for size, _ in cells):
        most = f"at most {long - room} for a context of {long}"
        raise SystemExit(
            f"--filled is {min(options.filled)}, expected {most}: give smaller ones, or a larger --allocated"
        )
    figures: dict[str, Any] = {name: getattr(options, name) for name in ("threads", "repetitions", "new_tokens")}
    figures |= {"model": manifest.model, "recipe": manifest.recipe, "ring_length": manifest.ring_length}
    with engines(bundle, cells, options.threads) as opened:
        runs = take_turns(opened, cells, options.repetitions, options.new_tokens)
        rates = [engine.close() for engine in opened.values()]
    of_passes = passes(bundle, (short, long), options.repetitions, options.threads)
    compared = ratios(runs, of_passes)
    return figures | {
        "acceptance_rate": max((rate for rate in rates if rate is not None), default=None),
        "rows": [row(runs, cell) for cell in cells],
        "passes_ms": of_passes,
        "ratios": compared,
        "same_text": same_text(runs),
        "goals_met": all(ratio["median"] <= ratio["goal"] for ratio in compared.values()),
    }


Cell = tuple[int, int]  # allocated, filled
Key = tuple[int, int, bool]  # allocated, filled if that is long and else 0, with drafts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of a cell: the first one, which warms up, and one of each repetition."""

    first: Answer
    repeated: list[Answer]

    @property
    def filled(self) -> list[Answer]:
        """Those that filled an empty cache: of a long text, the first one alone."""
        return [run for run in self.repeated if run.filled] or [self.first]


All = dict[tuple[Cell, bool], Runs]


def key_of(cell: Cell, use_mtp: bool) -> Key:
    """Return which engine has a cell."""
    return cell[0], cell[1] if cell[1] > LONG else 0, use_mtp


@contextmanager
def engines(bundle: Path, cells: Sequence[Cell], threads: int) -> Iterator[dict[Key, StockEngine]]:
    """Open an engine for each allocated length and each long text, with drafts and without."""
    manifest = read_manifest(bundle)
    with tempfile.TemporaryDirectory(prefix="mtp-context-") as folder, ExitStack() as stack:
        opened = {}
        for number, key in enumerate(dict.fromkeys(key_of(cell, mtp) for cell in cells for mtp in (False, True))):
            settings = Settings(
                model_path=str((bundle / manifest.files["litertlm"].path).resolve()),
                context_length=key[0],
                use_mtp=key[2],
                threads=threads,
                cache_folder=folder,
            )
            opened[key] = StockEngine(settings, Path(folder) / f"{number}.log")
            stack.callback(opened[key].close)
            opened[key].run(8, 4)  # one after the other: the first packs the weights for all
        yield opened


def take_turns(opened: dict[Key, StockEngine], cells: Sequence[Cell], repetitions: int, new_tokens: int) -> All:
    """Run every cell once in each repetition, plain and with drafts."""
    runs: All = {}
    for cell in cells:
        for mtp in (False, True):
            runs[cell, mtp] = Runs(first=opened[key_of(cell, mtp)].run(cell[1], new_tokens), repeated=[])
    for _ in range(repetitions):
        for (cell, mtp), own in runs.items():
            fill = 0 if cell[1] > LONG else cell[1]
            own.repeated.append(opened[key_of(cell, mtp)].run(fill, new_tokens))
    return runs


def passes(bundle: Path, allocated: Sequence[int], repetitions: int, threads: int) -> dict[str, dict[str, list[float]]]:
    """Return the milliseconds of passes with `AT` filled, by allocated length and kind: a figure a repetition."""
    times: dict[str, dict[str, list[float]]] = {str(size): {} for size in allocated}
    with ExitStack() as stack:
        sessions = {
            str(size): stack.enter_context(Session.open(bundle, threads=threads, verify=False, context_length=size))
            for size in allocated
        }
        for _ in range(repetitions):
            for size, session in sessions.items():
                for name, timing in time_passes(session, filled_prompt(session, AT), repeats=5).items():
                    times[size].setdefault(name.partition("_")[0], []).append(round(timing.median_ms, 4))
    return times


def row(runs: All, cell: Cell) -> dict[str, Any]:
    """Return the line of the table for one cell: tokens a second, and bytes without a file behind them."""
    plain, mtp = runs[cell, False], runs[cell, True]
    return {
        "allocated": cell[0],
        "filled": plain.first.filled,
        "prefill": spread([run.prefill_tokens_per_second for run in (*plain.filled, *mtp.filled)]),
        "plain": spread([run.tokens_per_second for run in plain.repeated]),
        "mtp": spread([run.tokens_per_second for run in mtp.repeated]),
        "anonymous_bytes": {"plain": plain.first.anonymous_bytes, "mtp": mtp.first.anonymous_bytes},
    }


def same_text(runs: All) -> bool:
    """Return whether each text goes on alike, whatever is allocated, with drafts and without."""
    texts: dict[int, list[str]] = {}
    for (cell, _), own in runs.items():
        texts.setdefault(cell[1], []).extend(run.text for run in own.filled)
    return all(common_beginning(text, same[0]) for same in texts.values() for text in same)


def common_beginning(text: str, other: str) -> bool:
    """Return whether one text begins with the other: with drafts the last round is whole."""
    shortest = min(len(text), len(other))
    return shortest > 0 and text[:shortest] == other[:shortest]


def ratios(runs: All, of_passes: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return the ratios that have goals: of times, repetition by repetition."""
    short, long = (int(size) for size in of_passes)
    values: dict[str, tuple[list[float], float]] = {}
    for name, times in of_passes[str(long)].items():
        values[name] = over(times, of_passes[str(short)][name]), GOAL_ALLOCATED
    at_short, at_long = (runs.get(((size, AT), False)) for size in (short, long))
    if at_short and at_long:
        values["LiteRT-LM's prefill"] = over(*(fill_times(own) for own in (at_long, at_short))), GOAL_ALLOCATED
        values["LiteRT-LM's decode"] = over(*(token_times(own) for own in (at_long, at_short))), GOAL_ALLOCATED
    most = max(filled for (allocated, filled), _ in runs if allocated == long)
    if most > AT and at_long:
        slow = token_times(runs[(long, most), False])
        values[f"LiteRT-LM's decode, {most} filled over {AT}"] = over(slow, token_times(at_long)), GOAL_FILLED
    return {name: spread(times) | {"goal": goal} for name, (times, goal) in values.items()}


def over(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return how many times as long as the others each took."""
    return [a / b for a, b in zip(times, others, strict=True)]


def fill_times(runs: Runs) -> list[float]:
    return [run.fill_ms for run in runs.filled]


def token_times(runs: Runs) -> list[float]:
    return [run.decode_ms / run.tokens for run in runs.repeated]


def print_table(figures: dict[str, Any]) -> None:
    """Print the rows, with ratios to the first one that has `AT` filled, and what has a goal."""
    print(f"\n{figures['model']}, {figures['recipe']}, {figures['threads']} threads")
    print(f"tokens a second: median (least–most), and the ratio to the first line with {AT} filled; anonymous MB")
    names = ("prefill", "plain", "mtp")
    print("allocated  filled  " + " ".join(f"{name:23}" for name in names) + " plain, mtp")
    first = next((line for line in figures["rows"] if line["filled"] >= AT - 1), figures["rows"][0])
    for line in figures["rows"]:
        speeds = " ".join(f"{speed_text(line[name], first[name]):23}" for name in names)
        memory = ", ".join(f"{count / 1e6:.0f}" for count in line["anonymous_bytes"].values())
        print(f"{line['allocated']:9} {line['filled']:7}  {speeds} {memory}")
    print(f"times, the long context over the short one with {AT} filled, unless another number is given:")
    for name, ratio in figures["ratios"].items():
        verdict = "" if ratio["median"] <= ratio["goal"] else "  MISSED"
        of = f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f}), goal {ratio['goal']}"
        print(f"  {name:46} {of}{verdict}")
    print("same text everywhere" if figures["same_text"] else "texts DIFFER by allocated length, or with drafts")


def speed_text(speed: dict[str, float], first: dict[str, float]) -> str:
    """Return a speed, its spread, and its ratio to that of another line."""
    median_text, low, high = (f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in list(speed.values())[:3])
    return f"{median_text} ({low}–{high}) {speed['median'] / first['median']:.2f}"


if __name__ == "__main__":
    sys.exit(main())
