"""The commands over a device, run where they are to run: here, by a device's Python, by a program, or by the app."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mtp_export.check.stock_runtime import check_stock_context
from mtp_export.device.adb import FOLDER, Adb
from mtp_export.device.app import run_with_app
from mtp_export.device.bench import UNKNOWN_HEAT, Measurement, schedule, without_warm_up
from mtp_export.device.binary import as_the_program_feeds, run_with_binary
from mtp_export.device.parity import fixed_texts, host_request
from mtp_export.device.places import check_where, describe, run_here, run_with_python
from mtp_export.device.protocol import Answer, PlaceDescription, Processor, Request, StockAnswer, TextPrompt, Where
from mtp_export.device.transfer import send_bundle, send_container
from mtp_runtime.bundle.context import opened_at
from mtp_runtime.bundle.contract import read_manifest
from mtp_runtime.errors import UserError

OnLine = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A bundle, where to run it and by which program, and the prompts. `binary` and `app` run LiteRT-LM alone.
    `context_length` in tokens, None for the bundle's own."""

    bundle: Path
    where: Where
    serial: str | None
    silence_s: float
    binary: Path | None
    app: bool
    stock: bool
    backend: Processor
    prompts: tuple[TextPrompt, ...]
    max_new_tokens: int
    threads: int
    context_length: int | None = None

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
        """Return the request for the bundle's runs without and with MTP; the place has the bundle in `folder`.

        Raises:
            UserError: the bundle, or LiteRT-LM where it is to run, cannot have such a context.
        """
        manifest = opened_at(read_manifest(self.bundle), self.context_length)
        container = manifest.files.get("litertlm")
        runs_stock = self.stock and container is not None
        if runs_stock:
            check_stock_context(manifest)
        return Request(
            bundle=folder,
            container=f"{folder}/{container.path}" if container else None,
            prompts=self.prompts,
            max_new_tokens=self.max_new_tokens,
            depths=(0, manifest.num_draft_tokens),
            runtimes=("mtp_runtime", "LiteRT-LM") if runs_stock else ("mtp_runtime",),
            backend=self.backend,
            threads=self.threads,
            context_length=manifest.context_length,
        )


def run_both(job: Job, on_line: OnLine) -> tuple[Answer, Answer]:
    """Return this machine's answer and the place's, which are one where the place is this machine.

    A place with Python also reads this machine's outputs by teacher forcing.

    Raises:
        MtpError: a runtime, the device or the connection fails.
    """
    if job.where == "host":
        on_line("on this machine")
        here = run_here(job.request(str(job.bundle)))
        return here, here
    adb, place = _opened(job)
    on_line("on this machine")
    with_python = not job.app and job.binary is None
    host = host_request(job.request(str(job.bundle)), read=with_python)
    here = run_here(as_the_program_feeds(host) if job.binary else host)
    if job.app:
        return here, Answer(place=place, stock=_by_app(adb, job, 1, on_line))

    def request_there(folder: str) -> Request:
        request = greedy_runs(job, job.request(folder))
        return msgspec.structs.replace(request, texts=fixed_texts(here)) if with_python else request

    return here, _by_shell(adb, place, job, request_there, on_line)


def measure(job: Job, repetitions: int, on_line: OnLine) -> Measurement:
    """Run LiteRT-LM, each prompt `repetitions` times, and read the device's thermal status before and after.

    Raises:
        MtpError: LiteRT-LM does not run this bundle, or it, the device or the connection fails.
    """

    def request(folder: str) -> Request:
        runs = job.request(folder)
        if runs.container is None:
            raise UserError(f"{job.bundle.name} has no .litertlm, and LiteRT-LM is timed: export it for tflite")
        prompts = tuple(schedule(job.prompts, repetitions))
        return msgspec.structs.replace(runs, prompts=prompts, runtimes=("LiteRT-LM",))

    def measurement(place: PlaceDescription, runs: tuple[StockAnswer, ...], thermal: tuple[str, ...]) -> Measurement:
        return Measurement(
            place=place,
            prompts=job.prompts,
            runs=runs,
            repetitions=repetitions,
            max_new_tokens=job.max_new_tokens,
            backend=job.backend,
            threads=job.threads,
            thermal=thermal,
        )

    if job.where == "host":
        on_line("on this machine")
        here = run_here(request(str(job.bundle)))
        return measurement(here.place, without_warm_up(here.stock), ())
    request(str(job.bundle))  # a bundle that cannot be timed is refused before a device is opened
    adb, place = _opened(job)
    before = _thermal_status(adb)
    if job.app:
        runs = _by_app(adb, job, repetitions, on_line)
    else:
        runs = without_warm_up(_by_shell(adb, place, job, request, on_line).stock)
    return measurement(place, runs, (before, _thermal_status(adb)))


def greedy_runs(job: Job, request: Request) -> Request:
    """Return the request without runs that are not greedy: without MTP the program draws tokens as the bundle says, and
    has no option for it."""
    if job.binary is None or not read_manifest(job.bundle).samples:
        return request
    return msgspec.structs.replace(request, depths=tuple(depth for depth in request.depths if depth))


def _opened(job: Job) -> tuple[Adb, PlaceDescription]:
    adb = Adb.open(job.serial, silence_s=job.silence_s)
    place = describe(adb)
    check_where(adb, place, job.where)
    return adb, place


def _by_app(adb: Adb, job: Job, repetitions: int, on_line: OnLine) -> tuple[StockAnswer, ...]:
    return run_with_app(adb, job.bundle, job.request(""), repetitions, on_line).runs


def _by_shell(
    adb: Adb, place: PlaceDescription, job: Job, request: Callable[[str], Request], on_line: OnLine
) -> Answer:
    def on_bytes(sent: int, total: int) -> None:
        on_line(f"pushing: {sent / 1e6:.0f} of {total / 1e6:.0f} MB")

    if job.binary is None:
        folder = send_bundle(adb, job.bundle, on_bytes).folder
        return run_with_python(adb, request(folder), lambda line: on_line(f"{adb.serial}: {line}"))
    folder = send_container(adb, job.bundle, f"{FOLDER}/bundles", on_bytes).folder
    return Answer(place=place, stock=run_with_binary(adb, job.binary, request(folder), on_line))


def _thermal_status(adb: Adb) -> str:
    """Return Android's own number, 0 for none up to 6 for a shutdown, or "unknown"."""
    status = re.search(r"Thermal Status: (\d)", adb.try_shell("dumpsys thermalservice").output)
    return status[1] if status else UNKNOWN_HEAT
