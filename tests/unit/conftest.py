"""Sessions on a backend without graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import talking

# When the drafter is right.
AGREE = {
    "right": lambda position: True,
    "wrong": lambda position: False,
    "mixed": lambda position: position % 3 != 0,
}


@pytest.fixture(params=AGREE)
def open_session(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[talking.OpenSession]:
    """Open a fresh session on the same bundle at each call; all are closed after the test."""
    with talking.closing_all(talking.fake_opener(tmp_path, AGREE[request.param])) as opened:
        yield opened
