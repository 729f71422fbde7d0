"""What holds of every unit test: no process, no conversion, and a tenth of a second.

Tests of random or simulated cases may take longer and say so: by hypothesis' `@given`, or by the marker `many_cases`.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mtp_export.formats import segment_cache, workers
from tests.support import talking

# Seconds of processor time, and how many times that a slow or busy machine, a first import, or a look at all modules
# may take: a conversion, which is what must not be here, takes more than that.
LIMIT_S, SLOW_MACHINE = 0.1, 40

# When the drafter is right.
AGREE: dict[str, Callable[[int], bool]] = {
    "right": lambda position: True,
    "wrong": lambda position: False,
    "mixed": lambda position: position % 3 != 0,
}


@pytest.fixture(params=AGREE)
def open_session(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[talking.OpenSession]:
    """Open a fresh session on the same bundle at each call; all are closed after the test."""
    with talking.closing_all(talking.fake_opener(tmp_path, AGREE[request.param])) as opened:
        yield opened


def _refuse(action: str) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail(f"a unit test {action}: move it to tests/end_to_end", pytrace=False)

    return refuse


@pytest.fixture(autouse=True)
def no_process_and_no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that starts a process or converts a segment."""
    monkeypatch.setattr(subprocess.Popen, "__init__", _refuse("starts a process"))
    monkeypatch.setattr(BaseProcess, "start", _refuse("starts a process"))
    monkeypatch.setattr(segment_cache, "results_in_order", _refuse("converts a segment"))
    monkeypatch.setattr(workers, "results_in_order", _refuse("converts a segment"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail a test that takes too much of the processor's time."""
    before = time.process_time()
    yield
    taken = time.process_time() - before
    of_many_cases = item.get_closest_marker("many_cases") or hasattr(getattr(item, "obj", None), "hypothesis")
    if taken > LIMIT_S * SLOW_MACHINE and not of_many_cases:
        pytest.fail(
            f"{taken:.2f} s: a unit test takes {LIMIT_S} s at most. Make it smaller, move it to tests/end_to_end, or "
            "mark it `many_cases` if it goes through random or simulated cases",
            pytrace=False,
        )
