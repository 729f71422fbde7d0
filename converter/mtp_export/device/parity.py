"""Parity of a place with this machine: the same prompts there and here, compared token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from mtp_export.check.parity import stock_result, tolerance_of
from mtp_export.device.protocol import Answer, AskedPrompt, PlaceDescription, Processor, Request, Runtime, TraceRun
from mtp_runtime.bundle.bundle import sha256_of
from mtp_runtime.bundle.contract import MANIFEST_NAME, Manifest, read_manifest
from mtp_runtime.measure.parity import ParityReport, RunnerResult, compare_tokens
from mtp_runtime.text.tokenizer import Tokenizer


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A parity report, stamped with the bundle and with where it ran; `host` is what it was compared with.

    `traces` are those of the place. On an emulated one the times in them say nothing about a device.
    """

    bundle_sha256: str
    host: PlaceDescription
    place: PlaceDescription
    parity: ParityReport
    traces: tuple[TraceRun, ...]

    def to_json(self) -> str:
        """Serialise, with `passed` spelled out."""
        document = {"passed": self.parity.passed, **msgspec.to_builtins(self)}
        return msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n"

    def to_markdown(self) -> str:
        """Return the parity report with the place it is of."""
        place = self.place
        stamp = f"Ran on: {title(place)} ({place.machine}, {place.system}); bundle {self.bundle_sha256[:16]}…"
        heading, _, rest = self.parity.to_markdown().partition("\n")
        return f"{heading}\n\n{stamp}\n{rest}"


def title(place: PlaceDescription) -> str:
    """Name a place in a line; an emulated one never goes without the word."""
    if place.where == "arm64-emulated":
        return f"ARM64, emulated CPU, over adb: {place.cpu} by {place.emulator}"
    return f"{'a phone' if place.where == 'phone' else 'this machine'}: {place.cpu}"


def request_for(
    bundle: Path,
    folder: str,
    prompts: Sequence[AskedPrompt],
    *,
    max_new_tokens: int,
    stock: bool,
    backend: Processor,
    threads: int,
) -> Request:
    """Ask for the bundle's runs without and with MTP; `folder` is where the place has the bundle."""
    manifest = read_manifest(bundle)
    container = manifest.files.get("litertlm")
    runtimes: tuple[Runtime, ...] = ("mtp_runtime", "LiteRT-LM") if container and stock else ("mtp_runtime",)
    return Request(
        bundle=folder,
        container=f"{folder}/{container.path}" if container else None,
        prompts=tuple(prompts),
        max_new_tokens=max_new_tokens,
        depths=(0, manifest.num_draft_tokens),
        runtimes=runtimes,
        backend=backend,
        threads=threads,
    )


def reference_request(request: Request) -> Request:
    """Ask for that part of a request that others are compared with."""
    return msgspec.structs.replace(request, depths=(0,), runtimes=("mtp_runtime",))


def compare(bundle: Path, request: Request, here: Answer, there: Answer) -> DeviceReport:
    """Hold what a place said against what this machine's reference runtime says without MTP.

    Raises:
        UserError: LiteRT-LM reads a prompt there as other tokens than we do.
    """
    manifest = read_manifest(bundle)
    reference = next(run for run in here.traces if run.num_draft_tokens == 0)
    tolerance = tolerance_of(manifest.recipe)
    names = [prompt.id for prompt in request.prompts]
    results = [_ours(run, reference, names, tolerance, request.max_new_tokens) for run in there.traces]
    tokenizer = Tokenizer.open(bundle / manifest.files["tokenizer"].path, manifest.bos_token_id)
    pieces = [_pieces(tokenizer, trace.tokens) for trace in reference.traces]
    for stock in there.stock:
        result = stock_result(stock.run, stock.num_draft_tokens, names, reference.traces, pieces, tolerance)
        results.append(result)
    if there.place.where == "arm64-emulated":
        # An emulated CPU's times say nothing about a device's.
        results = [msgspec.structs.replace(result, tokens_per_second=None) for result in results]
    report = ParityReport(
        model=manifest.model,
        recipe=manifest.recipe,
        reference="the reference runtime on this machine, without MTP",
        tolerance=tolerance,
        max_new_tokens=request.max_new_tokens,
        results=tuple(results),
        left_out=tuple(_left_out(manifest, there)),
    )
    return DeviceReport(
        bundle_sha256=sha256_of(bundle / MANIFEST_NAME),
        host=here.place,
        place=there.place,
        parity=report,
        traces=there.traces,
    )


def _ours(
    run: TraceRun, reference: TraceRun, names: Sequence[str], tolerance: float, max_new_tokens: int
) -> RunnerResult:
    stats = [trace.stats for trace in run.traces]
    drafted, rounds = sum(s.drafted for s in stats), sum(s.rounds for s in stats)
    wall_ms = sum(s.generate_wall_ms for s in stats)
    later = sum(max(0, s.committed_tokens - 1) for s in stats)
    comparisons = [
        compare_tokens(
            name,
            expected.tokens,
            found.tokens,
            margins=expected.margins,
            tolerance=tolerance,
            max_new_tokens=max_new_tokens,
        )
        for name, expected, found in zip(names, reference.traces, run.traces, strict=True)
    ]
    return RunnerResult(
        runner="mtp_runtime",
        num_draft_tokens=run.num_draft_tokens,
        tokens_per_second=1000.0 * later / wall_ms if wall_ms else None,
        acceptance_rate=sum(s.accepted for s in stats) / drafted if drafted else None,
        committed_per_round=sum(s.round_tokens for s in stats) / rounds if rounds else None,
        comparisons=tuple(comparisons),
    )


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    if pieces:
        pieces[-1] += stream.finish()
    return pieces


def _left_out(manifest: Manifest, there: Answer) -> list[str]:
    left_out = []
    if there.place.where == "arm64-emulated":
        left_out.append("speed: the CPU is emulated, and its times say nothing about a device's")
    if not there.traces:
        left_out.append("the reference runtime: --binary and --app run LiteRT-LM alone")
    if there.stock and all(run.num_draft_tokens for run in there.stock):
        left_out.append("LiteRT-LM without MTP: the program draws tokens as the bundle says, and has no option for it")
    if not there.stock and "litertlm" in manifest.files:
        left_out.append("LiteRT-LM: --no-stock was given")
    elif not there.stock:
        left_out.append(f"LiteRT-LM: it runs .litertlm files, and this bundle is {manifest.export_format}")
    return left_out
