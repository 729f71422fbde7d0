"""What MTP gains on a device by LiteRT-LM: runs of each prompt after a warm-up, MTP off and on, by kind of text.

The words are those of `mtp-export bench` where they mean the same, so that a device's file serves as a profile:
`passes` has what a token takes without drafts, `rounds` what it takes with the drafter's own, and `break_even` the
acceptance from which such rounds pay.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from mtp_export.check.stock_runtime import StockOutput, StockRun
from mtp_export.device.parity import title
from mtp_export.device.protocol import AskedPrompt, PlaceDescription, Processor, StockAnswer
from mtp_runtime.bundle.bundle import sha256_of
from mtp_runtime.bundle.contract import MANIFEST_NAME, Manifest, read_manifest
from mtp_runtime.measure.timing import Rounds, Timing, break_even
from mtp_runtime.text.tokenizer import Tokenizer


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


class DeviceBench(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What LiteRT-LM took on a device. `thermal` is what the device says of its heat before and after."""

    bundle: str
    bundle_sha256: str
    model: str
    recipe: str
    drafter_recipe: str
    backend: str
    machine: str
    place: PlaceDescription
    threads: int
    cache_length: int
    max_new_tokens: int
    repetitions: int
    open_s: float | None
    passes: Mapping[str, Timing]
    rounds: Sequence[Rounds]
    break_even: Mapping[int, float | None]
    variants: tuple[Variant, ...]
    kinds: tuple[KindGain, ...]
    thermal: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"


def schedule(prompts: Sequence[AskedPrompt], repetitions: int) -> list[AskedPrompt]:
    """The order of runs of one variant: a warm-up, which `without_warm_up` takes off, then every prompt so often."""
    return [prompts[0], *(prompt for prompt in prompts for _ in range(repetitions))]


def without_warm_up(answers: Sequence[StockAnswer]) -> tuple[StockAnswer, ...]:
    return tuple(
        msgspec.structs.replace(found, run=msgspec.structs.replace(found.run, outputs=found.run.outputs[1:]))
        for found in answers
    )


def summarise(
    bundle: Path,
    place: PlaceDescription,
    prompts: Sequence[AskedPrompt],
    answers: Sequence[StockAnswer],
    *,
    repetitions: int,
    max_new_tokens: int,
    backend: Processor,
    threads: int,
    thermal: Sequence[str],
) -> DeviceBench:
    """Sum up the runs without and with MTP, whose outputs are `repetitions` of one prompt after the other."""
    manifest = read_manifest(bundle)
    plain, drafted = (next(a for a in answers if bool(a.num_draft_tokens) == mtp) for mtp in (False, True))
    timed = place.where != "arm64-emulated"  # an emulated CPU's times say nothing about a device's
    variants = tuple(_variant(found, timed) for found in (plain, drafted))
    kinds: dict[str, list[int]] = {"all": list(range(len(prompts)))}
    for number, prompt in enumerate(prompts):
        kinds.setdefault(prompt.kind, []).append(number)
    per_token_ms = [output.decode_ms / output.num_tokens for output in plain.run.outputs if output.num_tokens]
    passes = {"decode": Timing.of(per_token_ms, 1)} if timed and per_token_ms else {}
    rounds = _rounds(manifest, bundle, plain.run, variants) if timed else []
    return DeviceBench(
        bundle=bundle.name,
        bundle_sha256=sha256_of(bundle / MANIFEST_NAME),
        model=manifest.model,
        recipe=manifest.recipe,
        drafter_recipe=manifest.drafter_recipe,
        backend=f"LiteRT-LM, {backend.upper()}",
        machine=f"{title(place)} ({place.system})",
        place=place,
        threads=threads,
        cache_length=manifest.cache_length,
        max_new_tokens=max_new_tokens,
        repetitions=repetitions,
        open_s=variants[0].open_s,
        passes=passes,
        rounds=rounds,
        break_even={r.num_draft_tokens: _break_even(rounds[0], r) for r in rounds[1:]},
        variants=variants,
        kinds=tuple(_gain(kind, chosen, plain.run, drafted.run, repetitions, timed) for kind, chosen in kinds.items()),
        thermal=tuple(thermal),
        notes=tuple(_notes(place, thermal, drafted)),
    )


def _variant(found: StockAnswer, timed: bool) -> Variant:
    run, k = found.run, found.num_draft_tokens
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
    """Empty where the runtime tells no acceptance: without it nothing is known of rounds."""
    tokenizer = Tokenizer.open(bundle / manifest.files["tokenizer"].path, manifest.bos_token_id)
    said = {token for output in plain.outputs for token in tokenizer.encode(output.text)}
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
            distinct_tokens=len(said),
        )
        for variant, speed in ((off, off.tokens_per_second), (on, on.tokens_per_second))
    ]


def _break_even(plain: Rounds, drafted: Rounds) -> float | None:
    round_ms = drafted.ms_per_token * drafted.committed_per_round
    return break_even(plain.ms_per_token, round_ms, drafted.num_draft_tokens)


def _gain(
    kind: str, chosen: Sequence[int], plain: StockRun, drafted: StockRun, repetitions: int, timed: bool
) -> KindGain:
    runs = [[_of_prompt(run, i, repetitions) for i in chosen] for run in (plain, drafted)]
    same = sum(on[0].text.startswith(off[0].text) for off, on in zip(*runs, strict=True))
    off, on = (_speed(outputs) if timed else None for outputs in runs)
    return KindGain(
        kind=kind,
        prompts=len(chosen),
        same_text=same,
        tokens_per_second_off=off,
        tokens_per_second_on=on,
        mtp_gain=on / off if off and on else None,
    )


def _of_prompt(run: StockRun, number: int, repetitions: int) -> list[StockOutput]:
    return run.outputs[number * repetitions : (number + 1) * repetitions]


def _speed(by_prompt: Sequence[Sequence[StockOutput]]) -> float:
    """Tokens per second of decoding: the median over repetitions, over all prompts; `Statistics` of the app's core."""
    ms = sum(statistics.median(output.decode_ms for output in outputs) for outputs in by_prompt)
    tokens = sum(statistics.median(output.num_tokens for output in outputs) for outputs in by_prompt)
    return 1000.0 * tokens / ms if ms else 0.0


def _notes(place: PlaceDescription, thermal: Sequence[str], drafted: StockAnswer) -> list[str]:
    notes = []
    if place.where == "arm64-emulated":
        notes.append("times are withheld: the CPU is emulated, and they say nothing about a device's")
        notes.append("memory is that of the emulator with the program in it")
    if drafted.run.acceptance_rate is None:
        notes.append("acceptance is not told by the runtime's log, so there are no figures of rounds")
    if any(status not in ("0", "not told") for status in thermal):
        notes.append("the device was throttled by its heat (thermal status above 0): let it cool and run it again")
    return notes
