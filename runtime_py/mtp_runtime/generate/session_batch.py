"""Several sequences of one bundle that share the passes of its graphs (ONNX bundles exported with --batch-size)."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Unpack

from mtp_runtime.backends.opening import check_threads
from mtp_runtime.bundle.bundle import Bundle
from mtp_runtime.errors import UserError
from mtp_runtime.generate.options import GenerationOptions, OptionChanges
from mtp_runtime.generate.session import Session
from mtp_runtime.generate.trace import GenerationTrace


class SessionBatch:
    """As many sessions as the bundle was exported for, each with a cache of its own.

    What a session generates does not depend on the others. Each is used from one thread at a time, as any session is;
    those that generate at the same time do so in common passes, which is where time is saved. Close the batch, not its
    sessions: they end together.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        """Take sessions of one set of graphs; use `open`."""
        self.sessions = tuple(sessions)

    @classmethod
    def open(
        cls, path: Path | str, *, threads: int = 2, verify: bool = True, cache_dir: Path | str | None = None
    ) -> SessionBatch:
        """Open the bundle at `path` for as many sequences as it was exported for, as `Session.open` does.

        Raises:
            UserError: it was exported for one sequence alone.
            MtpError: as `Session.open` does.
        """
        check_threads(threads)
        with contextlib.ExitStack() as opened:
            bundle = opened.enter_context(Bundle.open(path, verify=verify))
            if bundle.manifest.batch_size < 2:
                raise UserError(
                    f"{path} is for one sequence at a time: export it with --format onnx --batch-size 2 to 8"
                )
            from mtp_runtime.backends.onnx.backend import OnnxBackend

            backends = OnnxBackend.open_batch(
                bundle,
                sequences=bundle.manifest.batch_size,
                threads=threads,
                cache_dir=None if cache_dir is None else Path(cache_dir),
            )
            opened.pop_all()
        return cls([Session(bundle, backend) for backend in backends])

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        options: GenerationOptions | None = None,
        **changes: Unpack[OptionChanges],
    ) -> list[GenerationTrace]:
        """Return the continuation of each prompt, in order, with the options of `Session.generate`.

        There may be more prompts than sessions: each session takes the next one when it is done.

        Raises:
            MtpError: the error of the first prompt that fails, when all are done.
        """
        free: queue.SimpleQueue[Session] = queue.SimpleQueue()
        for session in self.sessions:
            free.put(session)

        def run(prompt: str | Sequence[int]) -> GenerationTrace:
            session = free.get()
            try:
                return session.generate(prompt, options, **changes).finish()
            finally:
                free.put(session)

        with ThreadPoolExecutor(len(self.sessions)) as threads:
            return list(threads.map(run, prompts))

    def close(self) -> None:
        """Release the graphs; closing twice is harmless."""
        for session in self.sessions:
            session.close()

    def __enter__(self) -> SessionBatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
