"""Jobs in processes: order, errors, and workers that die at the worst moments."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from mtp_export.formats.workers import results_in_order
from mtp_runtime.errors import BackendError, UserError

TOO_LATE_S = 20


def late_first(job: int) -> int:
    time.sleep(0.3 if job == 0 else 0.0)
    return 10 * job


def echo(job: bytes) -> bytes:
    time.sleep(0.02)
    return job


def die_at_two(job: int) -> int:
    if job == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def refuse(job: int) -> int:
    raise UserError(f"job {job} makes no sense")


class AwkwardError(Exception):
    """Pickled without what it needs to be made again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"awkward {one} {two}")


def refuse_awkwardly(job: int) -> int:
    raise AwkwardError(job, job)


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """What hangs fails soon."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(TOO_LATE_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("count", [1, 3, 9])
def test_results_come_in_the_order_of_the_jobs(count: int) -> None:
    assert list(results_in_order(late_first, range(6), count)) == [0, 10, 20, 30, 40, 50]
    assert list(results_in_order(late_first, [], count)) == []


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_dies_is_reported(count: int) -> None:
    with pytest.raises(BackendError, match="a conversion process died, most likely for want of memory"):
        list(results_in_order(die_at_two, range(5), count))


@pytest.mark.parametrize("delay_s", [0.0, 0.002, 0.005, 0.03, 0.06, 0.1, 0.13, 0.15, 0.17])
def test_a_worker_may_be_killed_at_any_moment(delay_s: float) -> None:
    """While it starts, while it reads a job larger than a pipe takes, and while it answers."""
    killed: list[int] = []

    def kill_first() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.0005)
        time.sleep(delay_s + 0.02 * random.random())
        with contextlib.suppress(IndexError):
            child = multiprocessing.active_children()[0]
            child.kill()
            killed.append(child.ident or 0)

    killer = threading.Thread(target=kill_first)
    killer.start()
    with pytest.raises(BackendError, match="a conversion process died"):
        list(results_in_order(echo, 200 * [bytes(1 << 20)], 2))
    killer.join()
    assert killed


def test_an_error_of_a_job_is_raised_as_it_is_with_where_it_came_from() -> None:
    with pytest.raises(UserError, match="job 0 makes no sense") as caught:
        list(results_in_order(refuse, range(3), 1))
    assert "in refuse" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="awkward 0 0"):
        list(results_in_order(refuse_awkwardly, range(3), 1))


def test_closing_early_ends_the_workers() -> None:
    results = results_in_order(echo, 500 * [b"x"], 2)
    assert next(results) == b"x"
    results.close()
    assert multiprocessing.active_children() == []
