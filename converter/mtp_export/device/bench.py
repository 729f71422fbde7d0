"""What MTP gains on a device by LiteRT-LM: runs of each prompt after a warm-up, MTP off and on, by kind of text.

The report is a profile (mtp_runtime.measure.profile), as that of `mtp-export bench`: `passes` has what a token takes
without drafts, `rounds` what it takes with the drafter's own, and `break_even` the acceptance from which they pay.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mtp_export.check.stock_runtime import StockOutput, StockRun
from mtp_export.device.protocol import PlaceDescription, Processor, StockAnswer, TextPrompt
from mtp_export.device.report import title
from mtp_runtime.bundle.bundle import sha256_of
from mtp_runtime.bundle.contract import MANIFEST_NAME, Manifest, read_manifest
from mtp_runtime.measure.profile import Profile
from mtp_runtime.measure.timing import Rounds, Timing, break_even
from mtp_runtime.text.tokenizer import Tokenizer

UNKNOWN_HEAT = "unknown"  # of a device that has no thermal service


class Variant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All runs with K drafts a round (0: without MTP). Times are None where they say nothing about a device."""

    num_draft_tokens: int
    open_s: float | None
    first_token_ms: float | None
    tokens_per_second: float | None
    acceptance_rate: float | None
    committed_per_round: float | None
    peak_memory_bytes: int | None
    warnings: tuple[str, ...]


class KindGain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of text, or all: the speed without and with MTP, and how many prompts got the same text."""

    kind: str
    prompts: int
    same_text: int
    tokens_per_second_off: float | None
    tokens_per_second_on: float | None
    mtp_gain: float | None


class DeviceBench(Profile, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What LiteRT-LM took on a device. `thermal` is the device's own number for its heat before and after."""

    bundle_sha256: str
    place: PlaceDescription
    max_new_tokens: int
    repetitions: int
    open_s: float | None
    variants: tuple[Variant, ...]
    kinds: tuple[KindGain, ...]
    thermal: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The runs of LiteRT-LM without and with MTP, whose outputs are `repetitions` of one prompt after the other."""

    place: PlaceDescription
    prompts: tuple[TextPrompt, ...]
    runs: tuple[StockAnswer, ...]
    repetitions: int
    max_new_tokens: int
    backend: Processor
    threads: int
    thermal: tuple[str, ...]

    @property
    def timed(self) -> bool:
        """Whether its times say something about a device: an emulated CPU's do not."""
        return self.place.where != "arm64-emulated"

    @property
    def plain(self) -> StockAnswer:
        """The runs without MTP."""
        return next(answer for answer in self.runs if not answer.num_draft_tokens)

    @property
    def drafted(self) -> StockAnswer:
        """The runs with MTP."""
        return next(answer for answer in self.runs if answer.num_draft_tokens)


def schedule(prompts: Sequence[TextPrompt], repetitions: int) -> list[TextPrompt]:
    """Return the order of runs of one variant: a warm-up, which `without_warm_up` takes off, then each prompt's."""
    return [prompts[0], *(prompt for prompt in prompts for _ in range(repetitions))]


def without_warm_up(answers: Sequence[StockAnswer]) -> tuple[StockAnswer, ...]:
    """Return the answers without their first outputs."""
    return tuple(
        msgspec.structs.replace(answer, run=msgspec.structs.replace(answer.run, outputs=answer.run.outputs[1:]))
        for answer in answers
    )


def summarise(bundle: Path, measurement: Measurement) -> DeviceBench:
    """Sum up the runs of a bundle without and with MTP."""
    manifest, place = read_manifest(bundle), measurement.place
    plain, timed = measurement.plain.run, measurement.timed
    variants = tuple(_variant(answer, timed) for answer in (measurement.plain, measurement.drafted))
    kinds: dict[str, list[int]] = {"all": list(range(len(measurement.prompts)))}
    for number, prompt in enumerate(measurement.prompts):
        kinds.setdefault(prompt.kind, []).append(number)
    per_token_ms = [output.decode_ms / output.num_tokens for output in plain.outputs if output.num_tokens]
    rounds = _rounds(manifest, bundle, plain, variants) if timed else []
    return DeviceBench(
        **DeviceBench.identity(bundle, manifest),
        bundle_sha256=sha256_of(bundle / MANIFEST_NAME),
        backend=f"LiteRT-LM, {measurement.backend.upper()}",
        machine=f"{title(place)} ({place.system})",
        place=place,
        threads=measurement.threads,
        max_new_tokens=measurement.max_new_tokens,
        repetitions=measurement.repetitions,
        open_s=variants[0].open_s,
        passes={"decode": Timing.of(per_token_ms, 1)} if timed and per_token_ms else {},
        rounds=rounds,
        break_even={r.num_draft_tokens: _break_even(rounds[0], r) for r in rounds[1:]},
        variants=variants,
        kinds=tuple(_gain(kind, numbers, measurement) for kind, numbers in kinds.items()),
        thermal=measurement.thermal,
        notes=tuple(_notes(measurement)),
    )


def _variant(answer: StockAnswer, timed: bool) -> Variant:
    run, k = answer.run, answer.num_draft_tokens
    rate = run.acceptance_rate
    return Variant(
        num_draft_tokens=k,
        open_s=round(run.load_ms / 1000.0, 3) if timed else None,
        first_token_ms=statistics.median(output.first_token_ms for output in run.outputs) if timed else None,
        tokens_per_second=run.tokens_per_second if timed else None,
        acceptance_rate=rate,
        committed_per_round=None if rate is None else 1 + k * rate,
        peak_memory_bytes=run.peak_memory_bytes,
        warnings=tuple(run.warnings),
    )


def _rounds(manifest: Manifest, bundle: Path, plain: StockRun, variants: Sequence[Variant]) -> list[Rounds]:
    """Return none where the runtime logs no acceptance: without it nothing is known of rounds."""
    tokenizer = Tokenizer.open(bundle / manifest.files["tokenizer"].path, manifest.bos_token_id)
    tokens = {token for output in plain.outputs for token in tokenizer.encode(output.text)}
    off, on = variants
    if on.committed_per_round is None or not off.tokens_per_second or not on.tokens_per_second:
        return []
    return [
        Rounds(
            num_draft_tokens=variant.num_draft_tokens,
            alpha=None,
            ms_per_token=1000.0 / speed,
            committed_per_round=variant.committed_per_round or 1.0,
            acceptance_rate=variant.acceptance_rate,
            same_output=True,
            distinct_tokens=len(tokens),
        )
        for variant, speed in ((off, off.tokens_per_second), (on, on.tokens_per_second))
    ]


def _break_even(plain: Rounds, drafted: Rounds) -> float | None:
    round_ms = drafted.ms_per_token * drafted.committed_per_round
    return break_even(plain.ms_per_token, round_ms, drafted.num_draft_tokens)


def _gain(kind: str, numbers: Sequence[int], measurement: Measurement) -> KindGain:
    plain, drafted = (
        [_of_prompt(answer.run, number, measurement.repetitions) for number in numbers]
        for answer in (measurement.plain, measurement.drafted)
    )
    same = sum(on[0].text.startswith(off[0].text) for off, on in zip(plain, drafted, strict=True))
    off, on = (_speed(outputs) if measurement.timed else None for outputs in (plain, drafted))
    return KindGain(
        kind=kind,
        prompts=len(numbers),
        same_text=same,
        tokens_per_second_off=off,
        tokens_per_second_on=on,
        mtp_gain=on / off if off and on else None,
    )


def _of_prompt(run: StockRun, number: int, repetitions: int) -> list[StockOutput]:
    return run.outputs[number * repetitions : (number + 1) * repetitions]


def _speed(by_prompt: Sequence[Sequence[StockOutput]]) -> float:
    """Return tokens per second of decoding: medians over repetitions, over all prompts, as the app's `Statistics`."""
    ms = sum(statistics.median(output.decode_ms for output in outputs) for outputs in by_prompt)
    tokens = sum(statistics.median(output.num_tokens for output in outputs) for outputs in by_prompt)
    return 1000.0 * tokens / ms if ms else 0.0


def _notes(measurement: Measurement) -> list[str]:
    notes = []
    if not measurement.timed:
        notes.append("times are withheld: the CPU is emulated, and they say nothing about a device's")
        notes.append("memory is that of the emulator with the program in it")
    if measurement.drafted.run.acceptance_rate is None:
        notes.append("the runtime's log has no acceptance, so there are no figures of rounds")
    if any(status not in ("0", UNKNOWN_HEAT) for status in measurement.thermal):
        notes.append("the device was throttled by its heat (thermal status above 0): let it cool and run it again")
    return notes
