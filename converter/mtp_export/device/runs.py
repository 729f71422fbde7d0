"""What a command over a device asks for, run where it asks: here, by a device's Python, by a program, or by the app."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mtp_export.device.adb import FOLDER, Adb
from mtp_export.device.app import run_with_app
from mtp_export.device.bench import schedule, without_warm_up
from mtp_export.device.binary import as_the_program_feeds, run_with_binary
from mtp_export.device.parity import reference_request, request_for
from mtp_export.device.places import check_where, describe, run_here, run_with_python
from mtp_export.device.protocol import Answer, AskedPrompt, PlaceDescription, Processor, Request, StockAnswer, Where
from mtp_export.device.transfer import send_bundle, send_container
from mtp_runtime.bundle.contract import read_manifest
from mtp_runtime.errors import UserError

OnLine = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A bundle, where to run it and by what, and the prompts. `binary` and `app` run LiteRT-LM alone."""

    bundle: Path
    where: Where
    serial: str | None
    silence_s: float
    binary: Path | None
    app: bool
    stock: bool
    backend: Processor
    prompts: tuple[AskedPrompt, ...]
    max_new_tokens: int
    threads: int

    def check(self) -> None:
        """Check what can be checked before anything runs.

        Raises:
            UserError: the options contradict each other.
        """
        alone = "--app" if self.app else "--binary" if self.binary else None
        if self.app and self.binary:
            raise UserError("--app and --binary were both given: give the one that is to run LiteRT-LM")
        if alone and self.where == "host":
            raise UserError(f"{alone} needs a device, and --where host is this machine: leave one of them out")
        if alone and not self.stock:
            raise UserError(f"{alone} runs LiteRT-LM alone, and --no-stock leaves it out: leave one of them out")
        if self.where == "phone" and not alone:
            raise UserError("a phone has no Python: run LiteRT-LM there with --app or --binary PATH (docs/device.md)")
        if self.backend == "gpu" and self.where == "arm64-emulated":
            raise UserError("the emulated ARM64 place has no GPU: leave out --backend gpu")

    def request(self, folder: str) -> Request:
        """The request for the bundle where the place has it."""
        return request_for(
            self.bundle,
            folder,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            stock=self.stock,
            backend=self.backend,
            threads=self.threads,
        )


def answers(asked: Asked, on_line: OnLine) -> tuple[Answer, Answer]:
    """What this machine says, and what the asked place says.

    Raises:
        MtpError: a runtime, the device or the connection fails.
    """
    if asked.where == "host":
        on_line("on this machine")
        here = run_here(asked.request(str(asked.bundle)))
        return here, here
    adb, place = _opened(asked)
    if asked.app:
        there = Answer(place=place, stock=_by_app(adb, asked, 1, on_line))
    else:
        there = _by_shell(adb, place, asked, lambda folder: greedy_runs(asked, asked.request(folder)), on_line)
    on_line("on this machine")
    reference = reference_request(asked.request(str(asked.bundle)))
    return run_here(as_the_program_feeds(reference) if asked.binary else reference), there


def measured(
    asked: Asked, repetitions: int, on_line: OnLine
) -> tuple[PlaceDescription, tuple[StockAnswer, ...], tuple[str, ...]]:
    """LiteRT-LM's runs, `repetitions` of one prompt after the other, and the device's thermal status around them.

    Raises:
        MtpError: LiteRT-LM does not run this bundle, or it, the device or the connection fails.
    """

    def request(folder: str) -> Request:
        asks = asked.request(folder)
        if asks.container is None:
            raise UserError(
                f"{asked.bundle.name} has no .litertlm, and LiteRT-LM is what is timed: export it for tflite"
            )
        return msgspec.structs.replace(
            asks, prompts=tuple(schedule(asked.prompts, repetitions)), runtimes=("LiteRT-LM",)
        )

    if asked.where == "host":
        on_line("on this machine")
        here = run_here(request(str(asked.bundle)))
        return here.place, without_warm_up(here.stock), ()
    request(str(asked.bundle))
    adb, place = _opened(asked)
    before = _thermal_status(adb)
    if asked.app:
        found = _by_app(adb, asked, repetitions, on_line)
    else:
        found = without_warm_up(_by_shell(adb, place, asked, request, on_line).stock)
    return place, found, (before, _thermal_status(adb))


def greedy_runs(asked: Asked, request: Request) -> Request:
    """Leave out what is not greedy: without MTP the program draws tokens as the bundle says, and cannot be told."""
    if asked.binary is None or not read_manifest(asked.bundle).samples:
        return request
    return msgspec.structs.replace(request, depths=tuple(depth for depth in request.depths if depth))


def _opened(asked: Asked) -> tuple[Adb, PlaceDescription]:
    adb = Adb.open(asked.serial, silence_s=asked.silence_s)
    place = describe(adb)
    check_where(adb, place, asked.where)
    return adb, place


def _by_app(adb: Adb, asked: Asked, repetitions: int, on_line: OnLine) -> tuple[StockAnswer, ...]:
    return run_with_app(adb, asked.bundle, asked.request(""), repetitions, on_line).runs


def _by_shell(
    adb: Adb, place: PlaceDescription, asked: Asked, request: Callable[[str], Request], on_line: OnLine
) -> Answer:
    def on_bytes(sent: int, total: int) -> None:
        on_line(f"pushing: {sent / 1e6:.0f} of {total / 1e6:.0f} MB")

    if asked.binary is None:
        folder = send_bundle(adb, asked.bundle, on_bytes).folder
        return run_with_python(adb, request(folder), lambda line: on_line(f"{adb.serial}: {line}"))
    folder = send_container(adb, asked.bundle, f"{FOLDER}/bundles", on_bytes).folder
    context_length = read_manifest(asked.bundle).context_length
    return Answer(place=place, stock=run_with_binary(adb, asked.binary, request(folder), context_length, on_line))


def _thermal_status(adb: Adb) -> str:
    """Android's own word: 0 for none, up to 6 for a shutdown."""
    found = re.search(r"Thermal Status: (\d)", adb.try_shell("dumpsys thermalservice").output)
    return found[1] if found else "not told"
