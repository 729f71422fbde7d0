"""What commands say on a terminal while they work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

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
