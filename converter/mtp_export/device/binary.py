"""LiteRT-LM's published command line program on a device: `litert_lm_advanced_main`, a process for every prompt.

Its text goes to standard output and its figures to its log; which of the two has the figures differs by release.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from mtp_export.check.stock_runtime import StockOutput, StockRun, last_complaint, parse_acceptance_rate, parse_warnings
from mtp_export.device.adb import FOLDER, Adb
from mtp_export.device.protocol import Request, StockAnswer
from mtp_export.device.transfer import Sent, send
from mtp_runtime.bundle.litertlm import read_metadata
from mtp_runtime.errors import BackendError, UserError

# Packed weights and compiled kernels, which it keeps beside the model: neither variant may profit of the other's.
_CACHES = ("*.xnnpack_cache*", "*_mldrift_*cache*.bin", "*.mtp_drafter*")


def run_with_binary(
    adb: Adb,
    binary: Path,
    request: Request,
    on_line: Callable[[str], None] = lambda line: None,
) -> tuple[StockAnswer, ...]:
    """Run `request`, whose paths are the device's, with the program `binary` and the libraries beside it.

    Raises:
        MtpError: there is no such program, it failed or was killed, or the device went away.
    """
    program = _send_program(adb, binary)
    prompts = _send_prompts(adb, request)
    answers = []
    for depth in request.depths:
        adb.shell(f"cd {request.bundle} && rm -f {' '.join(_CACHES)}")
        outputs: list[StockOutput] = []
        logs: list[str] = []
        for number, path in enumerate(prompts, 1):
            on_line(f"{binary.name}, K = {depth}, prompt {number} of {len(prompts)}")
            command = _command(program, request, path, depth)
            ended = adb.run(f"cd {request.bundle} && LD_LIBRARY_PATH={Path(program).parent}:$LD_LIBRARY_PATH {command}")
            outputs.append(parse_output(ended.output, ended.errors))
            logs.append(f"{ended.errors}\n{ended.output}")
        answers.append(StockAnswer(num_draft_tokens=depth, run=_joined(outputs, logs, depth)))
    return tuple(answers)


def as_the_program_feeds(request: Request) -> Request:
    """Return the request with its prompts as the program's session feeds them to the model: between what the container
    has around a user's turn, and with the beginning of a reply.

    Raises:
        BundleError: the container cannot be read.
    """
    if request.container is None:
        return request
    affixes = read_metadata(Path(request.container)).prompt_templates
    user, reply = affixes.user, affixes.model
    prompts = (
        msgspec.structs.replace(prompt, text=f"{user.prefix}{prompt.text}{user.suffix}{reply.prefix}")
        for prompt in request.prompts
    )
    return msgspec.structs.replace(request, prompts=tuple(prompts))


def parse_output(output: str, log: str) -> StockOutput:
    """Read what the program printed and logged for one prompt.

    Raises:
        BackendError: there is no text or no figure in it.
    """
    text = re.search(r"^output: (.*?)(?:\n+BenchmarkInfo:.*)?\Z", output, re.MULTILINE | re.DOTALL)
    both = f"{log}\n{output}"
    tokens = _figure(r"Decode Turn 1: Processed (\d+) tokens", both)
    speed = _figure(r"Decode Speed: ([\d.]+) tokens/sec", both)
    first = _figure(r"Time to first token: ([\d.]+) s", both)
    if text is None or not tokens or not speed or first is None:
        raise BackendError(
            f"the program printed no text, decode speed or time to first token: {last_complaint(log)}: take "
            "litert_lm_advanced_main of LiteRT-LM 0.11 or newer"
        )
    return StockOutput(
        text=text[1], num_tokens=int(tokens), decode_ms=1000.0 * tokens / speed, first_token_ms=1000.0 * first
    )


def _command(program: str, request: Request, prompt: str, depth: int) -> str:
    flags = {
        "backend": request.backend,
        "model_path": request.container,
        "input_prompt_file": prompt,
        "use_session": "true",  # the prompt as one turn, without the chat template: see `as_the_program_feeds`
        "async": "false",
        "max_num_tokens": request.context_length,
        "max_output_tokens": request.max_new_tokens,
        "num_cpu_threads": request.threads,
        "enable_speculative_decoding": "true" if depth else "false",
        "benchmark": "true",
        "report_peak_memory_footprint": "true",
    }
    return " ".join([program, *(f"--{name}={value}" for name, value in flags.items())])


def _joined(outputs: list[StockOutput], logs: Sequence[str], depth: int) -> StockRun:
    """Join the runs of many processes into one: rates are weighted by the rounds that they are of."""
    rates = [parse_acceptance_rate(log) for log in logs]
    weighted = [
        (rate, output.num_tokens / (1 + depth * rate))
        for rate, output in zip(rates, outputs, strict=True)
        if rate is not None
    ]
    rounds = sum(weight for _, weight in weighted)
    peaks_mb = [mb for log in logs if (mb := _figure(r"Peak system ram usage: ([\d.]+) ?MB", log)) is not None]
    return StockRun(
        outputs=outputs,
        load_ms=_figure(r"(?:Init Total|Total init time): ([\d.]+) ms", logs[-1]) or 0.0,
        acceptance_rate=sum(rate * weight for rate, weight in weighted) / rounds if rounds else None,
        peak_memory_bytes=int(max(peaks_mb) * 1e6) if peaks_mb else None,
        warnings=parse_warnings("\n".join(logs)),
    )


def _figure(pattern: str, text: str) -> float | None:
    figures = re.findall(pattern, text)
    return float(figures[-1]) if figures else None


def _send_program(adb: Adb, binary: Path) -> str:
    if not binary.is_file():
        raise UserError(
            f"{binary} is no file: give the litert_lm_advanced_main that LiteRT-LM publishes for android_arm64"
        )
    files = [Sent.of(path) for path in (binary, *sorted(binary.parent.glob("*.so")))]
    name = hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()[:16]
    folder = send(adb, files, f"{FOLDER}/programs/{name}").folder
    adb.shell(f"chmod 755 {folder}/{binary.name}")
    return f"{folder}/{binary.name}"


def _send_prompts(adb: Adb, request: Request) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="mtp-device-") as local:
        files = []
        for prompt in request.prompts:
            data = prompt.text.encode()
            path = Path(local) / f"{hashlib.sha256(data).hexdigest()[:16]}.txt"
            path.write_bytes(data)
            files.append(Sent.of(path))
        folder = send(adb, list(dict.fromkeys(files)), f"{FOLDER}/prompts").folder
        return [f"{folder}/{file.path.name}" for file in files]
