"""A parameter of a graph: its shape, its format, and its rows, read block by block."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from mtp_export.weights.recipes import WeightFormat

_BLOCK_BYTES = 4 << 20  # of float32 rows at a time: little enough to stay in a core's cache from step to step
OnBlock = Callable[[int, str], None]  # is called with bytes that were written, and the name of their parameter
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """What is to be written for one parameter.

    rows(start, stop) gives float32 rows to quantise (or int32, or int8, which are written as they are). With
    `unit_scale`, rows are int8 already and mean themselves: the graph multiplies by their scales later. With `stored`,
    they are integers with scales, as a checkpoint has them in this very format. `looked_up` tells a table of which rows
    are taken from a matrix that is multiplied.
    """

    shape: tuple[int, ...]
    format: WeightFormat
    rows: Callable[[int, int], Any]
    unit_scale: bool = False
    stored: bool = False
    looked_up: bool = False


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield function(item) of each item in turn, computed by several threads a few items ahead."""
    ahead: deque[Future[Result]] = deque()
    with _one_thread_each(), ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep torch's own threads out of the way of several that call it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# The parameters of each graph, by role and name.
Values = Mapping[str, Mapping[str, Parameter]]


def check_complete(role: str, names: Collection[str], parameters: Mapping[str, Parameter]) -> None:
    """Check that every parameter that a graph names is there."""
    if missing := sorted(set(names) - set(parameters)):
        raise AssertionError(f"no data for the parameters {missing} of {role}")


def row_blocks(parameter: Parameter, function: Callable[[Any], Result]) -> Iterator[Result]:
    """Yield function(rows) of all rows of a parameter, block by block, on as many threads as there are processors."""
    count = parameter.shape[0]
    step = max(1, _BLOCK_BYTES // (4 * math.prod(parameter.shape[1:])))

    def block(start: int) -> Result:
        return function(parameter.rows(start, min(count, start + step)))

    return in_order(block, range(0, count, step), len(os.sched_getaffinity(0)))
