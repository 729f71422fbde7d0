"""When drafts pay, from what passes cost."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from mtp_calibration.report.acceptance import Costs, KindRow, on_device, read_bench
from mtp_runtime.errors import UserError
from mtp_runtime.measure.profile import Profile
from mtp_runtime.measure.timing import Rounds, Timing, expected_committed


def test_break_even_is_where_a_round_takes_as_long_as_its_tokens() -> None:
    costs = Costs(decode_ms=2.0, rounds_ms={1: 3.0, 2: 4.0})
    # One draft: 3 ms for 1 + a tokens of 2 ms each.
    assert costs.break_even(1) == pytest.approx(0.5)
    acceptance = costs.break_even(2)
    assert acceptance is not None
    assert costs.expected_speed_up(expected_committed(acceptance, 2), 2) == pytest.approx(1.0, abs=1e-3)


def test_drafts_that_never_pay() -> None:
    assert Costs(decode_ms=1.0, rounds_ms={1: 2.5}).break_even(1) is None


PASSES_MS = {"prefill_9": 9.0, "decode": 2.0, "draft": 1.0, "verify_2": 2.5, "verify_3": 3.0, "head": 0.3}


def profile(**changes: object) -> Profile:
    """A device where a draft costs half a decode step."""
    timings = {ms: Timing(median_ms=ms, tokens=1, low_ms=ms, high_ms=ms, runs=3) for ms in PASSES_MS.values()}
    whole = Profile(
        bundle="nano-int8",
        model="nano",
        recipe="int8",
        drafter_recipe="int8",
        backend="LiteRT",
        machine="a phone",
        threads=1,
        cache_length=1024,
        passes={name: timings[ms] for name, ms in PASSES_MS.items()},
        rounds=[],
        break_even={1: 0.75, 2: None},
    )
    return msgspec.structs.replace(whole, **changes)


def written(folder: Path, document: Profile | dict[str, object]) -> Path:
    path = folder / "bench.json"
    path.write_bytes(msgspec.json.encode(document))
    return path


def only(*names: str) -> dict[str, Timing]:
    return {name: timing for name, timing in profile().passes.items() if name in names}


def test_a_profile_shows_which_drafts_pay_there(tmp_path: Path) -> None:
    name, costs = read_bench(written(tmp_path, profile()), "nano")
    assert (name, costs) == ("a phone", Costs(decode_ms=2.0, rounds_ms={1: 3.5, 2: 5.0}, draft_ms=1.0))
    rows = [
        KindRow(kind=kind, num_draft_tokens=k, rounds=9, accepted_at=(), committed_per_round=committed, speed_up=9.0)
        for kind, by_k in (("code", (1.9, 2.8, 3.7)), ("prose", (1.5, 1.9, 2.0)))
        for k, committed in enumerate(by_k, 1)
    ]
    device = on_device(name, costs, rows)
    # Code: 1.9 x 2 / 3.5 with one draft and 2.8 x 2 / 5 with two; the bench has no times for three.
    assert [round(one.speed_up, 3) for one in device.expected] == [1.086, 1.12, 0.857, 0.76]
    assert device.advice == "drafts pay for code (K = 2, 1.12 times plain); not for prose"
    assert device.break_even == pytest.approx({1: 0.75, 2: 0.8229}, abs=1e-4)


def rounds(k: int, ms_per_token: float, committed: float, alpha: float | None = None) -> Rounds:
    return Rounds(
        num_draft_tokens=k,
        alpha=alpha,
        ms_per_token=ms_per_token,
        committed_per_round=committed,
        acceptance_rate=None,
        same_output=True,
        distinct_tokens=9,
    )


def test_whole_rounds_serve_where_drafts_were_not_timed_alone(tmp_path: Path) -> None:
    """As `device bench` writes it: LiteRT-LM shows no times of single drafts."""
    measured = [rounds(0, 2.0, 1.0), rounds(4, 9.0, 1.0, alpha=0.0), rounds(4, 1.5, 3.0)]
    bench = profile(passes=only("decode"), rounds=measured, break_even={4: 0.5})
    assert read_bench(written(tmp_path, bench), "nano") == ("a phone", Costs(decode_ms=2.0, rounds_ms={4: 4.5}))


@pytest.mark.parametrize(
    ("bench", "message"),
    [
        (profile(model="e2b"), "has the times of e2b, expected nano"),
        (profile(passes=only("decode", "draft")), "cannot read a device's times from .*: give what mtp-export bench"),
        ({"machine": "a phone", "model": "nano"}, "cannot read a device's times from .*missing required field"),
        (profile(passes={}), "has no times, as of an emulated place: run mtp-export device bench on a phone$"),
        (profile(passes=only("decode")), "has no times of rounds, because the runtime logged no acceptance"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, bench: Profile | dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_bench(written(tmp_path, bench), "nano")
