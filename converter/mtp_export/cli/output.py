"""What commands say on a terminal while they work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import click
from rich.console import Console


@contextlib.contextmanager
def working(doing: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done for as long as it takes, on a terminal alone; call what it gives with what comes next."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(doing) as status:
        yield lambda text: status.update(text)


def print_notes(notes: Iterable[str]) -> None:
    """Print what a user had better know, a line each on standard error."""
    for note in notes:
        click.echo(f"mtp-export: note: {note}", err=True)
