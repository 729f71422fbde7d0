"""What several sequences ask for at the same time is done in common."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from mtp_runtime.errors import BackendError, ContextFullError
from mtp_runtime.generate.shared_passes import SharedPasses


class Doubling:
    """Doubles numbers, and remembers which sequences met."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []

    def run(self, work: Mapping[int, int]) -> dict[int, int]:
        self.passes.append(sorted(work))
        time.sleep(0.001)  # as a pass takes its time, with the interpreter free
        if -1 in work.values():
            raise ContextFullError("full")
        return {sequence: 2 * value for sequence, value in work.items()}


@pytest.fixture
def doubling() -> Doubling:
    return Doubling()


@pytest.fixture
def shared(doubling: Doubling) -> SharedPasses:
    return SharedPasses({int: doubling.run, str: lambda work: {n: text.upper() for n, text in work.items()}})


def test_sequences_meet_once_they_know_of_each_other(doubling: Doubling, shared: SharedPasses) -> None:
    together = threading.Barrier(3)

    def ask(sequence: int) -> list[int]:
        together.wait()
        return [shared.run(sequence, 10 * sequence + step) for step in range(20)]

    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(ask, range(3)))
    assert results == [[20 * sequence + 2 * step for step in range(20)] for sequence in range(3)]
    assert sum(map(len, doubling.passes)) == 60
    assert doubling.passes.count([0, 1, 2]) >= 10


def test_who_has_ended_is_not_waited_for(doubling: Doubling, shared: SharedPasses) -> None:
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda sequence: shared.run(sequence, sequence), range(2)))
    assert [shared.run(0, value) for value in range(50)] == [2 * value for value in range(50)]
    assert doubling.passes[-50:] == [[0]] * 50


def test_each_kind_has_its_own_passes(shared: SharedPasses) -> None:
    with ThreadPoolExecutor(2) as threads:
        number, text = threads.submit(shared.run, 0, 4), threads.submit(shared.run, 1, "a")
        assert (number.result(), text.result()) == (8, "A")


def test_an_error_reaches_everyone_in_the_pass_and_nobody_later(shared: SharedPasses) -> None:
    with pytest.raises(ContextFullError):
        shared.run(0, -1)
    assert shared.run(0, 1) == 2


def test_an_interrupted_pass_leaves_nobody_waiting() -> None:
    entered = threading.Event()

    def interrupted(work: Mapping[int, int]) -> dict[int, int]:
        entered.set()
        raise KeyboardInterrupt

    shared = SharedPasses({int: interrupted})
    outcomes: list[type[BaseException]] = []

    def ask(sequence: int) -> None:
        try:
            shared.run(sequence, 1)
        except (BackendError, KeyboardInterrupt) as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=ask, args=(sequence,)) for sequence in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert entered.is_set()
    assert len(outcomes) == 2
