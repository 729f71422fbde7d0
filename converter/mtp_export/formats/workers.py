"""Jobs spread over processes, any of which may die at any moment.

Each worker has a pipe of its own, so that one that dies takes no lock with it: `ProcessPoolExecutor` shares its queues
between workers, and waits for ever when one is killed while it holds a queue's lock, is half-way through a result, or
is being started (seen with Python 3.11).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple, cast

from mtp_export.bundle.staging import uninterrupted
from mtp_runtime.errors import BackendError


class _Worker(NamedTuple):
    process: SpawnProcess
    pipe: Connection


def results_in_order(function: Callable[[Any], Any], jobs: Sequence[Any], count: int) -> Generator[Any, None, None]:
    """Yield `function(job)` of each job, in the jobs' order, computed by up to `count` processes.

    Close the iterator to end the processes. `function`, jobs and results must be picklable.

    Raises:
        BackendError: a worker died, most likely killed for its memory.
        Exception: what `function` raised.
    """
    workers: list[_Worker] = []
    try:
        _start_resource_tracker()
        with uninterrupted(), _deaf_children():  # a worker that is not told what to run ends with a traceback
            for _ in range(min(count, len(jobs))):
                workers.append(_start(function))
        yield from _exchange([worker.pipe for worker in workers], jobs)
    finally:
        # Killed whatever they do: the idle have nothing to lose, and what the others still compute nobody wants.
        with uninterrupted():
            for worker in workers:
                worker.process.kill()
            for worker in workers:
                worker.process.join()
                worker.pipe.close()


def _start_resource_tracker() -> None:
    """Before the workers, which would start it: that ends their deafness. It cleans up what killed workers leave, and
    need not tell the user of it."""
    warnings_before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    try:
        resource_tracker.ensure_running()
    finally:
        if warnings_before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = warnings_before


def _start(function: Callable[[Any], Any]) -> _Worker:
    context = multiprocessing.get_context("spawn")  # forking a process with torch's threads can hang
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, theirs))
    process.start()
    theirs.close()  # the worker's is the only one now, and its death the end of the pipe
    return _Worker(process, ours)


def _exchange(pipes: Sequence[Connection], jobs: Sequence[Any]) -> Iterator[Any]:
    """Give each worker one job at a time; a worker that answers gets the next."""
    running: dict[Connection, int] = {}
    done: dict[int, Any] = {}
    waiting = iter(enumerate(jobs))
    for pipe, (number, job) in zip(pipes, waiting, strict=False):
        _send(pipe, job)
        running[pipe] = number
    for position in range(len(jobs)):
        while position not in done:
            for pipe in cast(list[Connection], wait(list(running))):
                succeeded, result = _receive(pipe)
                if not succeeded:
                    raise result
                done[running.pop(pipe)] = result
                for number, job in waiting:
                    _send(pipe, job)
                    running[pipe] = number
                    break
        yield done.pop(position)


def _send(pipe: Connection, job: Any) -> None:
    content = pickle.dumps(job)
    try:
        pipe.send_bytes(content)
    except OSError as error:
        raise _death() from error


def _receive(pipe: Connection) -> tuple[bool, Any]:
    try:
        content = pipe.recv_bytes()
    except (EOFError, OSError) as error:  # OSError where it ends half-way through an answer
        raise _death() from error
    answer: tuple[bool, Any] = pickle.loads(content)
    return answer


def _death() -> BackendError:
    return BackendError(
        "a conversion process died, most likely for want of memory: close other programs, or set --workers 1"
    )


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Start processes that never hear Ctrl-C, not even while they start: the parent hears it and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """Answer jobs until the pipe ends, silently, and end with the parent, however it ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(os.devnull, "wb") as null:
        # The libraries' chatter is not for the parent's terminal.
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    while True:
        try:
            job = pickle.loads(pipe.recv_bytes())
            answer = pickle.dumps((True, function(job)))
        except EOFError:
            return
        except Exception as error:  # noqa: BLE001  every error is the parent's to judge
            answer = _told(error)
        pipe.send_bytes(answer)


def _told(error: Exception) -> bytes:
    """An answer that raises `error`, or its text where it does not survive the way."""
    text = traceback.format_exc()
    error.add_note(text)
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
    except Exception:  # noqa: BLE001  whatever its own way of being pickled raises
        return pickle.dumps((False, RuntimeError(text)))
    return answer


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
