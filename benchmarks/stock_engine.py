"""An engine of stock LiteRT-LM in a process of its own, which waits while others take their turns.

`StockEngine` is the parent's side. The process is `python -m benchmarks.stock_engine`: it reads its settings and then
an order from each line of its standard input, and answers each with a line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import msgspec

from benchmarks.machine import ROOT
from mtp_export.check.stock_runtime import last_complaint, parse_acceptance_rate

_MORE = " and"  # LiteRT-LM decodes after a prefill only


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The `.litertlm`, how many slots to allocate, whether to draft, and the folder of packed weights."""

    model_path: str
    context_length: int
    use_mtp: bool
    threads: int
    cache_folder: str


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to do next: fill an empty cache with so many tokens, unless it is 0, and then generate some."""

    fill: int
    new_tokens: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What an order took. `filled` are the tokens of the prompt, 0 if there was none to be filled with."""

    filled: int
    fill_ms: float
    tokens: int
    decode_ms: float
    anonymous_bytes: int
    text: str

    @property
    def tokens_per_second(self) -> float:
        return 1000.0 * self.tokens / self.decode_ms

    @property
    def prefill_tokens_per_second(self) -> float:
        return 1000.0 * self.filled / self.fill_ms


class StockEngine:
    """An engine that lives in a process of its own; its log goes to a file."""

    def __init__(self, settings: Settings, log: Path) -> None:
        """Start the process; the engine is opened there."""
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.stock_engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
            )
        self._send(settings)

    def run(self, fill: int, new_tokens: int) -> Answer:
        """Wait for what an order takes.

        Raises:
            SystemExit: the process ended, with the last error of its log.
        """
        self._send(Order(fill=fill, new_tokens=new_tokens))
        line = _pipe(self._process.stdout).readline()
        if not line:
            self.close()
            raise SystemExit(f"LiteRT-LM failed: {last_complaint(self._read_log())}")
        return msgspec.json.decode(line, type=Answer)

    def close(self) -> float | None:
        """End the process; return the acceptance that the engine logs as it closes, None without drafts."""
        _pipe(self._process.stdin).close()
        self._process.wait()
        return parse_acceptance_rate(self._read_log())

    def _send(self, value: Settings | Order) -> None:
        pipe = _pipe(self._process.stdin)
        pipe.write(msgspec.json.encode(value).decode() + "\n")
        pipe.flush()

    def _read_log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")


def _pipe(pipe: Any) -> TextIO:
    assert pipe is not None, "the process was started with pipes"
    stream: TextIO = pipe
    return stream


class _Fill:
    """Prompts of a wanted number of tokens, and the session that holds the last one."""

    def __init__(self, engine: Any, greedy: Any) -> None:
        self._engine, self._greedy = engine, greedy
        self._session: Any = None

    def start(self, count: int, new_tokens: int) -> tuple[int, float]:
        """Fill an empty cache with some `count` tokens; return how many they are, and the milliseconds."""
        self.close()
        prompt = self._prompt(count)
        self._session = self._engine.create_session(
            apply_prompt_template=False, sampler_config=self._greedy, max_output_tokens=new_tokens
        )
        started = time.perf_counter()
        self._session.run_prefill([prompt])
        return 1 + len(self._engine.tokenize(prompt)), 1000.0 * (time.perf_counter() - started)

    def decode(self) -> tuple[int, float, str]:
        """Generate; return the number of tokens, the milliseconds and the text."""
        started = time.perf_counter()
        texts = self._session.run_decode().texts
        decode_ms = 1000.0 * (time.perf_counter() - started)
        return self._session.get_benchmark_info().last_decode_token_count, decode_ms, texts[0] if texts else ""

    def go_on(self) -> None:
        self._session.run_prefill([_MORE])

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def _prompt(self, count: int) -> str:
        """Return a text of `count` tokens with the start token, or nearly: a cut text may be read as others."""
        ids = self._engine.tokenize(" ".join(f"def f{i}(a): return a + {i}" for i in range(count // 4 + 8)))
        cut = want = count - 1
        text = ""
        for _ in range(8):
            text = self._engine.detokenize(ids[:cut])
            over = len(self._engine.tokenize(text)) - want
            if not over:
                break
            cut -= over
        return str(text)


def _anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def _serve(settings: Settings, answers: TextIO) -> None:
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.INFO)
    with litert_lm.Engine(
        settings.model_path,
        backend=litert_lm.Backend.CPU(thread_count=settings.threads),
        max_num_tokens=settings.context_length,
        enable_speculative_decoding=settings.use_mtp,
        enable_benchmark=True,
        cache_dir=settings.cache_folder,
    ) as engine:
        fill = _Fill(engine, litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0))
        for line in sys.stdin:
            order = msgspec.json.decode(line, type=Order)
            filled, fill_ms = fill.start(order.fill, order.new_tokens) if order.fill else (0, 0.0)
            if not order.fill:
                fill.go_on()
            tokens, decode_ms, text = fill.decode()
            answer = Answer(
                filled=filled,
                fill_ms=fill_ms,
                tokens=tokens,
                decode_ms=decode_ms,
                anonymous_bytes=_anonymous_bytes(),
                text=text,
            )
            print(msgspec.json.encode(answer).decode(), file=answers, flush=True)
        fill.close()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as own_output:
        os.dup2(2, 1)  # the library may print
        _serve(msgspec.json.decode(sys.stdin.readline(), type=Settings), own_output)
