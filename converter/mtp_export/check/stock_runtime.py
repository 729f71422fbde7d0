"""Stock LiteRT-LM as a client of our `.litertlm`: what it generates, how fast, and how its drafts fare.

It runs in a process of its own: it logs to file descriptor 2, only its log has the acceptance, which it writes as the
engine closes, and a crash of it must not be ours. `python -m mtp_export.check.stock_runtime` is that process.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from mtp_export.check.chats import MAX_CALLS, Chat, answers_message, user_message
from mtp_export.child_process import ChildFailedError, ChildTimeoutError, answer_parent, run_child
from mtp_runtime.bundle.contract import Manifest
from mtp_runtime.errors import BackendError, UserError

_DISTRIBUTIONS = ("litert-lm-api", "litert-lm-api-nightly")
# What a version does wrong with drafts, whatever the bundle; docs/litert-lm.md has what an app can do.
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


def check_stock_context(manifest: Manifest) -> None:
    """Check that LiteRT-LM takes a prompt in the context of an opened bundle: it wants room for a whole prefill.

    Raises:
        UserError: the context is shorter than the shortest prefill.
    """
    prefills = [spec.num_tokens for spec in manifest.signatures["target"] if spec.kind == "prefill"]
    if manifest.context_length < min(prefills, default=0):
        raise UserError(
            f"the context is {manifest.context_length}, and LiteRT-LM takes no prompt in fewer than {min(prefills)} "
            "tokens, the shortest prefill: give a larger --context-length"
        )


class StockTurn(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a chat, or the answers of tools, and the reply to it.

    `fed` is the text that the runtime fed the model, `held_tokens` how many tokens it holds after the reply.
    """

    message: dict[str, Any]
    fed: str
    reply: dict[str, Any]
    held_tokens: int

    @property
    def text(self) -> str:
        """Return the text of the reply, without calls and thoughts."""
        parts = self.reply.get("content", [])
        return "".join(part.get("text", "") for part in parts)

    @property
    def thought(self) -> str:
        """Return the thought of the reply, empty if there is none."""
        return str(self.reply.get("channels", {}).get("thought", ""))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Return the functions that the reply calls, as {"name": …, "arguments": …}."""
        return [call["function"] for call in self.reply.get("tool_calls", [])]


class StockRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What stock LiteRT-LM is to generate, greedily, from the `.litertlm` at `model_path`.

    `prompts` are fed without a chat template, and get `max_new_tokens` each; with MTP the runtime may give up to K
    tokens more, all of its last round: compare prefixes. `chats` are held as its Conversation has them, with replies of
    `max_chat_tokens` at most. `backend` is cpu or gpu; on a GPU `activations` are fp32 or fp16, None for the runtime's
    own choice.
    """

    model_path: str
    prompts: Sequence[str]
    max_new_tokens: int
    context_length: int
    use_mtp: bool
    threads: int = 2
    backend: str = "cpu"
    activations: str | None = None
    chats: Sequence[Chat] = ()
    max_chat_tokens: int = 0
    timeout_s: float = 600.0


class StockOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What the runtime generated after one prompt.

    `prompt_ids` are the tokens of the prompt as the runtime reads it, without its start token; None if it does not
    report them. `decode_ms` is the time of the whole decode call, the first token included. `first_token_ms` is the
    time from the start of the prompt's pass to the first token, as the runtime measures it.
    """

    text: str
    num_tokens: int
    decode_ms: float
    first_token_ms: float
    prompt_ids: list[int] | None = None


class StockRun(msgspec.Struct, frozen=True, kw_only=True):
    """All prompts and chats of one engine; a chat that failed has fewer turns, and `chat_errors` has the reason.

    `acceptance_rate` is accepted per drafted tokens, None without MTP. `load_ms` is the time that creating the engine
    took. `warnings` are the runtime's own lines about what fell back to another processor.
    """

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


def run_stock(request: StockRequest) -> StockRun:
    """Run stock LiteRT-LM in a process of its own.

    Raises:
        BackendError: it is not installed, refuses the bundle, fails or takes longer than the request's `timeout_s`.
    """
    timeout_s = request.timeout_s
    try:
        run, log = run_child("mtp_export.check.stock_runtime", request, StockRun, timeout_s=timeout_s)
    except ChildTimeoutError:
        raise BackendError(f"stock LiteRT-LM did not finish within {timeout_s:g} s") from None
    except ChildFailedError as failure:
        complaint = last_complaint(failure.log)
        raise BackendError(f"stock LiteRT-LM failed (exit {failure.exit_code}): {complaint}") from None
    return msgspec.structs.replace(run, acceptance_rate=parse_acceptance_rate(log), warnings=parse_warnings(log))


def parse_acceptance_rate(log: str) -> float | None:
    """Return the acceptance that the engine logs as it closes, None where it logs none. 0.18.1 logs no counts."""
    rates = re.findall(r"MTP Drafter - Success rate: ([0-9.e+-]+)$", log, re.MULTILINE)
    return float(rates[-1]) if rates else None


def parse_warnings(log: str) -> list[str]:
    """Return the lines of a log about what runs on another processor than was requested."""
    lines = [line for line in log.splitlines() if "falling back to cpu" in line.lower()]
    return list(dict.fromkeys(re.sub(r"^.*?\.(?:cc|h|cpp):\d+\] ", "", line).strip() for line in lines))


def last_complaint(log: str) -> str:
    """Return the last error in the library's log, or the last line of the log."""
    errors: list[str] = re.findall(r"^(?:E\d{4} \S+ +\d+ \S+\] |ERROR: )(.+)$", log, re.MULTILINE)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return (errors or lines or ["its log is empty"])[-1]


def declared_tools(declarations: Sequence[dict[str, Any]]) -> list[Any] | None:
    """Return OpenAI's declarations of tools as LiteRT-LM's, which are never executed; None if there are none.

    Loads the library. Calls of these tools are answered by hand.
    """
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
    """Hold a chat; return its turns, and the error if it ended early."""
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
            for text in chat.user_texts:
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


def _generate(engine: Any, prompt: str, greedy: Any, max_new_tokens: int) -> StockOutput:
    with engine.create_session(
        apply_prompt_template=False, sampler_config=greedy, max_output_tokens=max_new_tokens
    ) as session:
        session.run_prefill([prompt])
        started = time.perf_counter()
        responses = session.run_decode()
        decode_ms = 1000.0 * (time.perf_counter() - started)
        benchmark = session.get_benchmark_info()
        return StockOutput(
            text=responses.texts[0] if responses.texts else "",
            prompt_ids=engine.tokenize(prompt),
            num_tokens=benchmark.last_decode_token_count,
            decode_ms=decode_ms,
            first_token_ms=1000.0 * benchmark.time_to_first_token_in_second,
        )


def _run(request: StockRequest, folder: Path) -> StockRun:
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.INFO)
    greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)
    cpu = litert_lm.Backend.CPU(thread_count=request.threads)
    started = time.perf_counter()
    with litert_lm.Engine(
        request.model_path,
        backend=litert_lm.Backend.GPU() if request.backend == "gpu" else cpu,
        activation_data_type=litert_lm.ActivationDataType.from_str(request.activations or ""),
        max_num_tokens=request.context_length,
        enable_speculative_decoding=request.use_mtp,
        enable_benchmark=True,
        cache_dir=str(folder),  # for packed weights, which it would otherwise leave beside the model
    ) as engine:
        load_ms = 1000.0 * (time.perf_counter() - started)
        outputs = [_generate(engine, prompt, greedy, request.max_new_tokens) for prompt in request.prompts]
        chats = [_chat(engine, chat, greedy, request.max_chat_tokens) for chat in request.chats]
    return StockRun(
        outputs=outputs,
        chats=[turns for turns, _ in chats],
        chat_errors=[error for _, error in chats],
        load_ms=load_ms,
        peak_memory_bytes=_peak_memory_bytes(),
    )


def _peak_memory_bytes() -> int | None:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return 1024 * int(peak[1]) if peak else None


if __name__ == "__main__":
    answer_parent(StockRequest, _run)
