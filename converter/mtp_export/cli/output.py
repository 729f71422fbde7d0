"""What commands print: tables, notes, and progress while they work.

Results go to standard output; notes, errors and progress go to standard error. On a terminal progress is a bar or a
spinner that disappears. Elsewhere, as in a log, it is plain lines, and work of less than two seconds writes none.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mtp_export.progress import Progress as ExportProgress

_FIRST_LINE_S = 2.0  # a stage that ends earlier writes no line
_NEXT_LINE_S = 10.0  # between two lines of a stage


@contextlib.contextmanager
def working(stage: str) -> Iterator[Callable[[str], None]]:
    """Show `stage` while the block runs; the block calls the function that it gets with the name of the next stage."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(stage) as status:
            yield lambda text: status.update(text)
        return
    with ProgressLines() as lines:
        lines.start(stage, 0)
        yield lines.update


@contextlib.contextmanager
def export_progress() -> Iterator[ExportProgress]:
    """Show the stages of an export while the block runs: a bar for each on a terminal, else plain lines."""
    console = Console(stderr=True)
    with _Bars(console) if console.is_terminal else ProgressLines() as progress:
        yield progress


def print_notes(notes: Iterable[str]) -> None:
    """Print what the user should know, one line each, on standard error."""
    for note in notes:
        click.echo(f"mtp-export: note: {note}", err=True)


def context_text(sizes: Any) -> str:
    """Return the contexts of a plan or a manifest in words."""
    if not sizes.longest_context_length:
        return f"context {sizes.context_length} tokens"
    default, longest = sizes.context_length, sizes.longest_context_length
    return f"context {default} tokens unless the app chooses another, at most {longest}"


def number_table(title: str | None, first: str, *names: str) -> Table:
    """Return an empty table: a column of names on the left, then columns of numbers, aligned on the right."""
    table = Table(first, title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    return table


class _Stage:
    """A stage of known size (0: unknown) and how much of it is done."""

    def __init__(self, name: str, total: int, *, of_bytes: bool) -> None:
        self.name, self.total, self.done = name, total, 0
        self._of_bytes, self._tensors = of_bytes, set[str]()

    def advance(self, done: int, tensor: str) -> None:
        self.done += done
        self._tensors.add(tensor)

    def count(self) -> str:
        """Return `12/27`, or for bytes `812 tensors 1.02/2.26 GB`."""
        if self._of_bytes:
            return f"{len(self._tensors)} tensors {self.done / 1e9:.2f}/{self.total / 1e9:.2f} GB"
        return f"{self.done}/{self.total}"


class _Bars:
    """A bar for each stage, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:>20}"),
            BarColumn(bar_width=10),  # a line fits 80 columns
            TaskProgressColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._open("", 0, of_bytes=False)

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None:
        self._bars.update(self._task, completed=self._bars.tasks[self._task].total)
        self._open(stage, total, of_bytes=of_bytes)

    def _open(self, stage: str, total: int, *, of_bytes: bool) -> None:
        self._task = self._bars.add_task(stage, total=total or None, visible=bool(stage), count="")
        self._stage = _Stage(stage, total, of_bytes=of_bytes)

    def advance(self, done: int, name: str = "") -> None:
        self._stage.advance(done, name)
        self._bars.update(self._task, advance=done, count=self._stage.count())


class ProgressLines:
    """Plain lines on standard error, written by a thread of its own, since a stage may compute for minutes.

    A stage that takes longer than two seconds gets a line. While it goes on it gets another every ten seconds, if there
    is something new. Nothing is written once the block has ended, so a line never stands behind or within an error.
    """

    def __init__(self, write: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`write` takes a line, `clock` returns seconds; both are for tests."""
        self._write, self._clock = write or _write_line, clock
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._stage = _Stage("", 0, of_bytes=False)
        self._line, self._due_s = "", float("inf")
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ProgressLines:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None:
        with self._lock:
            self._stage = _Stage(stage, total, of_bytes=of_bytes)
            self._line, self._due_s = "", self._clock() + _FIRST_LINE_S

    def advance(self, done: int, name: str = "") -> None:
        with self._lock:
            self._stage.advance(done, name)

    def update(self, text: str) -> None:
        """Show another text from the next line on; the time of that line stays."""
        with self._lock:
            self._stage.name = text

    def tick(self) -> None:
        """Write the line that is due, if one is."""
        with self._lock:
            now = self._clock()
            if now < self._due_s or self._ended.is_set():
                return
            line = self._stage.name
            if self._stage.total and self._stage.done:
                line += f", {self._stage.done / self._stage.total:.0%}, {self._stage.count()}"
            if line != self._line:
                self._write(line)
            self._line, self._due_s = line, now + _NEXT_LINE_S

    def _run(self) -> None:
        while not self._ended.wait(0.25):
            try:
                self.tick()
            except OSError:
                return  # nobody reads standard error any more


def _write_line(line: str) -> None:
    click.echo(f"mtp-export: working: {line}", err=True)
