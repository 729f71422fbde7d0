"""Progress where there is no terminal: plain lines, and none for what is soon done."""

from __future__ import annotations

import pytest

from mtp_export.cli.output import ProgressLines, export_progress, working


class Log:
    """A clock that is set by hand, and the lines that are written."""

    def __init__(self) -> None:
        self.now_s, self.lines = 0.0, list[str]()
        self.progress = ProgressLines(self.lines.append, lambda: self.now_s)

    def at(self, now_s: float) -> list[str]:
        """Move the clock and return the lines that are written then."""
        self.now_s = now_s
        before = len(self.lines)
        self.progress.tick()
        return self.lines[before:]


def test_a_stage_of_less_than_two_seconds_writes_nothing() -> None:
    log = Log()
    log.progress.start("loading", 0)
    assert log.at(1.9) == []
    log.progress.start("converting graphs", 4)
    assert log.at(3.8) == []


def test_a_stage_of_two_seconds_writes_its_name_once() -> None:
    log = Log()
    log.progress.start("loading", 0)
    assert log.at(2.0) == ["loading"]
    assert [log.at(now_s) for now_s in (3.0, 12.0, 60.0)] == [[], [], []]


def test_a_stage_of_known_size_writes_its_share_every_ten_seconds() -> None:
    log = Log()
    log.progress.start("converting graphs", 4)
    assert log.at(2.0) == ["converting graphs"]
    log.progress.advance(1)
    assert log.at(11.9) == []
    assert log.at(12.0) == ["converting graphs, 25%, 1/4"]
    log.progress.advance(2)
    assert log.at(21.9) == []
    assert log.at(22.0) == ["converting graphs, 75%, 3/4"]


def test_a_stage_of_bytes_writes_tensors_and_gigabytes() -> None:
    log = Log()
    log.progress.start("writing weights", 4_000_000_000, of_bytes=True)
    log.progress.advance(500_000_000, "a")
    log.progress.advance(500_000_000, "a")
    log.progress.advance(1_000_000_000, "b")
    assert log.at(2.0) == ["writing weights, 50%, 2 tensors 2.00/4.00 GB"]


def test_a_new_stage_has_two_seconds_of_its_own() -> None:
    log = Log()
    log.progress.start("loading", 0)
    assert log.at(5.0) == ["loading"]
    log.progress.start("converting graphs", 0)
    assert log.at(6.9) == []
    assert log.at(7.0) == ["converting graphs"]


def test_many_short_texts_write_one_line_every_ten_seconds() -> None:
    log = Log()
    log.progress.start("loading", 0)
    seen = []
    for second in range(40):
        log.progress.update(f"step {second}")
        seen += log.at(second)
    assert seen == ["step 2", "step 12", "step 22", "step 32"]


def test_nothing_is_written_once_the_work_has_ended() -> None:
    log = Log()
    with log.progress as progress:
        progress.start("loading", 0)
    assert log.at(100.0) == []


def test_short_work_without_a_terminal_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with working("loading") as show:
        show("answers")
    with export_progress() as progress:
        progress.start("converting graphs", 2)
        progress.advance(1)
    assert capfd.readouterr() == ("", "")
