"""A drawing of what a committed token takes at each acceptance, as SVG: a line for each K by the times of its passes,
the whole rounds that were measured, plain decoding, and where they cross."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from mtp_export.check.bench import BenchReport
from mtp_runtime.measure.timing import expected_committed, round_ms

_WIDTH, _HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 150, 50, 60
_COLOURS = ("#7f7f7f", "#1f77b4", "#2ca02c", "#9467bd", "#d62728", "#8c564b", "#17becf", "#bcbd22")
_STEPS = 50


def draw(report: BenchReport) -> str:
    """Return the drawing as the text of an SVG file."""
    plot = _Plot(report)
    title = f"{report.model}, {report.recipe}, {report.backend}, {report.threads} threads, {report.filled} filled"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 24, title, size=14),
        *plot.axes(),
        *plot.plain(),
        *plot.lines(),
        *plot.measured(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Plot:
    def __init__(self, report: BenchReport) -> None:
        self.report = report
        self.medians = report.medians_ms
        self.decode = self.medians["decode"]
        top = max(self.decode, *(rounds.ms_per_token for rounds in report.rounds))
        self.top = 1.08 * max(top, *(round_ms(self.medians, k) for k in report.break_even))

    def x(self, alpha: float) -> float:
        return _LEFT + alpha * (_WIDTH - _LEFT - _RIGHT)

    def y(self, ms: float) -> float:
        return _HEIGHT - _BOTTOM - ms / self.top * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> Iterator[str]:
        for i in range(6):
            alpha, ms = i / 5, self.top * i / 5
            yield _line(self.x(alpha), self.y(0), self.x(alpha), self.y(self.top), "#e5e5e5")
            yield _line(self.x(0), self.y(ms), self.x(1), self.y(ms), "#e5e5e5")
            yield _text(self.x(alpha), self.y(0) + 18, f"{alpha:.1f}", anchor="middle")
            yield _text(_LEFT - 8, self.y(ms) + 4, f"{ms:.3g}", anchor="end")
        yield _text(self.x(0.5), _HEIGHT - 18, "acceptance of a draft, per position", anchor="middle")
        yield _text(_LEFT, _TOP - 8, "ms per committed token")

    def plain(self) -> Iterator[str]:
        y = self.y(self.decode)
        yield _line(self.x(0), y, self.x(1), y, "black", dashes="6 4")
        yield _text(self.x(1) + 8, y + 4, f"plain {self.decode:.3g}")

    def lines(self) -> Iterator[str]:
        """Yield a line for each K, and a circle at the acceptance where it crosses plain decoding."""
        for k, even in self.report.break_even.items():
            colour, taken = _COLOURS[k % len(_COLOURS)], round_ms(self.medians, k)
            alphas = [i / _STEPS for i in range(_STEPS + 1)]
            points = " ".join(f"{self.x(a):.1f},{self.y(taken / expected_committed(a, k)):.1f}" for a in alphas)
            yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
            pays = "never pays" if even is None else f"pays from {even:.2f}"
            yield _text(self.x(1) + 8, _TOP + 14 + 18 * k, f"K = {k}: {pays}", colour=colour)
            if even is not None:
                yield (
                    f'<circle cx="{self.x(even):.1f}" cy="{self.y(self.decode):.1f}" r="5" fill="none" '
                    f'stroke="{colour}" stroke-width="2"><title>break-even of K = {k}: {even:.2f}</title></circle>'
                )

    def measured(self) -> Iterator[str]:
        colour = _COLOURS[self.report.num_draft_tokens % len(_COLOURS)]
        for rounds in self.report.rounds:
            if rounds.alpha is not None:
                x, y = self.x(rounds.alpha) - 3, self.y(rounds.ms_per_token) - 3
                yield f'<rect x="{x:.1f}" y="{y:.1f}" width="6" height="6" fill="{colour}"/>'
        yield _text(self.x(1) + 8, _TOP + 14, "squares: measured")


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "") -> str:
    style = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{style}/>'


def _text(x: float, y: float, content: str, *, anchor: str = "start", colour: str = "black", size: int = 12) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}" font-size="{size}">{escape(content)}</text>'
