"""Stock LiteRT-LM as a client of our `.litertlm`: what it says, how fast, and how its drafts fared.

It runs in a process of its own: its log goes straight to file descriptor 2, its acceptance is told only there, when the
engine closes, and a crash of it must not be ours. `python -m mtp_export.check.stock_runtime` is that process: it takes
a request as JSON on standard input and writes the answer to the file that the request names.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from mtp_export.check.chats import MAX_CALLS, Chat, answers_message, user_message
from mtp_runtime.errors import BackendError

_DISTRIBUTIONS = ("litert-lm-api", "litert-lm-api-nightly")
# What a version does wrong with drafts, whatever the bundle; docs/litert-lm.md says what an app can do.
_FAULTS = {
    "0.18": "it samples the first token only, fails at constrained decoding, and gives up to K tokens more than "
    "max_output_tokens",
    "0.19": "it samples from another distribution, and gives up to K tokens more than max_output_tokens",
}


def known_faults() -> str | None:
    """Return the faults that the installed version of LiteRT-LM is known for with drafts, in one line; None if it is
    known for none, or none is installed."""
    for name in _DISTRIBUTIONS:
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        faults = _FAULTS.get(".".join(installed.split(".")[:2]))
        if faults is not None:
            return f"LiteRT-LM {installed} has known faults with drafts: {faults} (docs/litert-lm.md)"
    return None


class StockTurn(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a chat, or the answers of tools: what the app handed over, the text that the runtime fed the
    model, what the app got, and how many tokens the runtime holds then."""

    message: dict[str, Any]
    fed: str
    reply: dict[str, Any]
    held_tokens: int

    @property
    def text(self) -> str:
        """The text of the reply, without calls and thoughts."""
        parts = self.reply.get("content", [])
        return "".join(part.get("text", "") for part in parts)

    @property
    def thought(self) -> str:
        """The thought of the reply, empty where there is none."""
        return str(self.reply.get("channels", {}).get("thought", ""))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The functions that the reply calls, as {"name": …, "arguments": …}."""
        return [call["function"] for call in self.reply.get("tool_calls", [])]


class _Request(msgspec.Struct, kw_only=True):
    model_path: str
    answer_path: str
    prompts: list[str]
    max_new_tokens: int
    context_length: int
    use_mtp: bool
    threads: int
    backend: str
    activations: str | None
    chats: list[Chat] = []
    max_chat_tokens: int = 0


class StockOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one prompt got.

    `prompt_ids` is how the runtime itself reads the prompt, its start token not included; None where it does not tell.
    `decode_ms` is the time of the whole decode call, which the first token is part of; `first_token_ms` that from the
    start of the prompt's pass to the first token, as the runtime measures it.
    """

    text: str
    num_tokens: int
    decode_ms: float
    first_token_ms: float
    prompt_ids: list[int] | None = None


class StockRun(msgspec.Struct, frozen=True, kw_only=True):
    """All prompts and chats of one engine; a chat that failed has fewer turns, and `chat_errors` says why.
    `acceptance_rate` is accepted per drafted tokens, None without MTP; `load_ms` is what creating the engine took.
    `warnings` say what fell back to another processor, in the runtime's own words."""

    outputs: list[StockOutput]
    chats: list[list[StockTurn]] = []
    chat_errors: list[str] = []
    load_ms: float = 0.0
    acceptance_rate: float | None = None
    peak_memory_bytes: int | None = None
    warnings: list[str] = []

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of decoding over all prompts."""
        decode_ms = sum(output.decode_ms for output in self.outputs)
        return 1000.0 * sum(output.num_tokens for output in self.outputs) / decode_ms if decode_ms else 0.0


def run_stock(
    model_path: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    context_length: int,
    use_mtp: bool,
    threads: int = 2,
    backend: str = "cpu",
    activations: str | None = None,
    timeout_s: float = 600.0,
    chats: Sequence[Chat] = (),
    max_chat_tokens: int = 0,
) -> StockRun:
    """Run stock LiteRT-LM greedily over `prompts`, without a chat template, and over `chats` as its Conversation has
    them, with replies of `max_chat_tokens` at most; on the CPU or, with `backend` gpu, on the GPU, there with
    `activations` in fp32 or fp16 (None: its own choice).

    With MTP the runtime may say up to K tokens more than `max_new_tokens`, all of its last round: compare prefixes.

    Raises:
        BackendError: it is not installed, refuses the bundle, fails or takes longer than `timeout_s`.
    """
    with tempfile.TemporaryDirectory(prefix="mtp-stock-") as folder:
        answer_path = Path(folder) / "answer.json"
        request = _Request(
            model_path=str(model_path),
            answer_path=str(answer_path),
            prompts=list(prompts),
            max_new_tokens=max_new_tokens,
            context_length=context_length,
            use_mtp=use_mtp,
            threads=threads,
            backend=backend,
            activations=activations,
            chats=list(chats),
            max_chat_tokens=max_chat_tokens,
        )
        command = [sys.executable, "-P", "-m", "mtp_export.check.stock_runtime"]
        try:
            done = subprocess.run(
                command, input=msgspec.json.encode(request), capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise BackendError(f"stock LiteRT-LM did not finish within {timeout_s:g} s") from None
        log = done.stderr.decode("utf-8", errors="replace")
        if done.returncode != 0 or not answer_path.exists():
            raise BackendError(f"stock LiteRT-LM failed (exit {done.returncode}): {last_complaint(log)}")
        run = msgspec.json.decode(answer_path.read_bytes(), type=StockRun)
    return msgspec.structs.replace(run, acceptance_rate=parse_acceptance_rate(log), warnings=parse_warnings(log))


def parse_acceptance_rate(log: str) -> float | None:
    """Return the acceptance that the engine logs as it closes, None where it logs none. 0.18.1 tells no counts."""
    rates = re.findall(r"MTP Drafter - Success rate: ([0-9.e+-]+)$", log, re.MULTILINE)
    return float(rates[-1]) if rates else None


def parse_warnings(log: str) -> list[str]:
    """Return the lines of a log that say what runs elsewhere than it was asked to."""
    lines = [line for line in log.splitlines() if "falling back to cpu" in line.lower()]
    return list(dict.fromkeys(re.sub(r"^.*?\.(?:cc|h|cpp):\d+\] ", "", line).strip() for line in lines))


def last_complaint(log: str) -> str:
    """Return the last error that the library logged, or the last line of the log."""
    errors: list[str] = re.findall(r"^(?:E\d{4} \S+ +\d+ \S+\] |ERROR: )(.+)$", log, re.MULTILINE)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return (errors or lines or ["it said nothing"])[-1]


def declared_tools(declarations: Sequence[dict[str, Any]]) -> list[Any] | None:
    """Return LiteRT-LM's tools of OpenAI's declarations, for conversations whose calls are answered by hand; None where
    there are none. Loads the library."""
    import litert_lm

    class DeclaredTool(litert_lm.Tool):  # type: ignore[misc]  # the library has no types
        def __init__(self, declaration: dict[str, Any]) -> None:
            self._declaration = declaration

        def get_tool_description(self) -> dict[str, Any]:
            return self._declaration

        def execute(self, param: Any) -> Any:
            raise NotImplementedError("calls are answered by hand")

    return [DeclaredTool(declaration) for declaration in declarations] or None


def _chat(engine: Any, chat: Chat, greedy: Any, max_tokens: int) -> tuple[list[StockTurn], str]:
    """Hold a chat; returns what came, and why it ended early if it did."""
    turns: list[StockTurn] = []
    try:
        with engine.create_conversation(
            system_message=chat.system,
            tools=declared_tools(chat.tools),
            extra_context=chat.variables,
            automatic_tool_calling=False,
            sampler_config=greedy,
            max_output_tokens=max_tokens,
        ) as conversation:
            for text in chat.says:
                message = user_message(text)
                for _ in range(1 + MAX_CALLS):
                    fed = conversation.render_message_to_string(message)
                    reply = dict(conversation.send_message(message))
                    held = conversation.token_count
                    turns.append(StockTurn(message=message, fed=fed, reply=reply, held_tokens=held))
                    if not turns[-1].calls:
                        break
                    message = answers_message([(c["name"], chat.answer(c["name"])) for c in turns[-1].calls])
    except RuntimeError as error:
        return turns, str(error)
    return turns, ""


def _main() -> None:
    import litert_lm

    request = msgspec.json.decode(sys.stdin.buffer.read(), type=_Request)
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.INFO)
    greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)
    outputs, turns, errors = [], [], []
    on_gpu = request.backend == "gpu"
    started = time.perf_counter()
    with litert_lm.Engine(
        request.model_path,
        backend=litert_lm.Backend.GPU() if on_gpu else litert_lm.Backend.CPU(thread_count=request.threads),
        activation_data_type=litert_lm.ActivationDataType.from_str(request.activations or ""),
        max_num_tokens=request.context_length,
        enable_speculative_decoding=request.use_mtp,
        enable_benchmark=True,
        # Its caches of packed weights, which it would otherwise leave beside the model.
        cache_dir=str(Path(request.answer_path).parent),
    ) as engine:
        load_ms = 1000.0 * (time.perf_counter() - started)
        for prompt in request.prompts:
            with engine.create_session(
                apply_prompt_template=False, sampler_config=greedy, max_output_tokens=request.max_new_tokens
            ) as session:
                session.run_prefill([prompt])
                started = time.perf_counter()
                responses = session.run_decode()
                decode_ms = 1000.0 * (time.perf_counter() - started)
                benchmark = session.get_benchmark_info()
                outputs.append(
                    StockOutput(
                        text=responses.texts[0] if responses.texts else "",
                        prompt_ids=engine.tokenize(prompt),
                        num_tokens=benchmark.last_decode_token_count,
                        decode_ms=decode_ms,
                        first_token_ms=1000.0 * benchmark.time_to_first_token_in_second,
                    )
                )
        for chat in request.chats:
            replies, error = _chat(engine, chat, greedy, request.max_chat_tokens)
            turns.append(replies)
            errors.append(error)
    peak = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    peak_bytes = 1024 * int(peak[1]) if peak else None
    run = StockRun(outputs=outputs, chats=turns, chat_errors=errors, load_ms=load_ms, peak_memory_bytes=peak_bytes)
    Path(request.answer_path).write_bytes(msgspec.json.encode(run))


if __name__ == "__main__":
    _main()
