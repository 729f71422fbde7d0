"""When drafts pay, from what passes cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtp_calibration.report.acceptance import Costs, KindRow, on_device, read_bench
from mtp_runtime.errors import UserError
from mtp_runtime.measure.timing import expected_committed


def test_break_even_is_where_a_round_takes_as_long_as_its_tokens() -> None:
    costs = Costs(decode_ms=2.0, draft_ms=0.5, verify_ms=(2.5, 3.0))
    # One draft: 3 ms for 1 + a tokens of 2 ms each.
    assert costs.break_even(1) == pytest.approx(0.5)
    found = costs.break_even(2)
    assert found is not None
    assert costs.expected_speed_up(expected_committed(found, 2), 2) == pytest.approx(1.0, abs=1e-3)


def test_drafts_that_never_pay() -> None:
    assert Costs(decode_ms=1.0, draft_ms=1.0, verify_ms=(1.5,)).break_even(1) is None


def bench_json(folder: Path, **changes: object) -> Path:
    """What `bench --json` prints, as far as it is read, of a device where a draft costs half a decode step."""
    passes = {"prefill_9": 9.0, "decode": 2.0, "draft": 1.0, "verify_2": 2.5, "verify_3": 3.0, "head": 0.3}
    timed = {
        name: {"median_ms": ms, "tokens": 1, "low_ms": ms, "high_ms": ms, "runs": 3} for name, ms in passes.items()
    }
    bench = {"machine": "a phone", "model": "nano", "passes": timed, "break_even": {"1": 0.75, "2": None}, **changes}
    path = folder / "bench.json"
    path.write_text(json.dumps(bench))
    return path


def test_a_device_says_what_pays_there(tmp_path: Path) -> None:
    name, costs = read_bench(bench_json(tmp_path), "nano")
    assert (name, costs) == ("a phone", Costs(decode_ms=2.0, draft_ms=1.0, verify_ms=(2.5, 3.0)))
    rows = [
        KindRow(kind=kind, num_draft_tokens=k, rounds=9, accepted_at=(), committed_per_round=committed, speed_up=9.0)
        for kind, by_k in (("code", (1.9, 2.8, 3.7)), ("prose", (1.5, 1.9, 2.0)))
        for k, committed in enumerate(by_k, 1)
    ]
    device = on_device(name, costs, rows)
    # Code: 1.9 x 2 / 3.5 with one draft and 2.8 x 2 / 5 with two; the bench has no times for three.
    assert [round(one.speed_up, 3) for one in device.expected] == [1.086, 1.12, 0.857, 0.76]
    assert device.advice == "drafts pay for code (K = 2, 1.12 times plain); not for prose"
    assert device.break_even == pytest.approx((0.75, 0.8229), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "e2b"}, "has the times of e2b, expected nano"),
        ({"passes": {"decode": {"median_ms": 1.0}}}, "cannot read a device's times from .*'draft'"),
        ({"passes": 3}, "cannot read a device's times"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_bench(bench_json(tmp_path, **changes), "nano")
