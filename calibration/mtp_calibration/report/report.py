"""The report of a bundle: one HTML file that needs nothing else, and the same as JSON."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import msgspec

from mtp_calibration.report.acceptance import Costs, Device, KindRow
from mtp_runtime import Manifest
from mtp_runtime.measure.timing import expected_committed

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}pre{white-space:pre-wrap;background:#f6f6f6;padding:.7em;border-radius:4px}
.accepted{background:#c8ecc8}.correction{background:#f6c9c2}.bonus{background:#c9dcf7}.plain{background:#eee}
.prompt{color:#888}.failed{color:#a00;font-weight:bold}.passed{color:#070;font-weight:bold}svg text{font-size:11px}
"""
_COLOURS = ("#1b6ca8", "#c0562f", "#3a8f3a", "#8650a8", "#777", "#b8860b")
_ORIGINS = ("accepted", "correction", "bonus", "plain")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 460, 240, 40, 30


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """A generation: the text of each token, and where it came from."""

    prompt_id: str
    kind: str
    prompt: str
    pieces: tuple[str, ...]
    origins: tuple[str, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the page shows. The first of `devices` is the one that it was made on. `calibration` is what
    `calibrate` wrote, if it was run."""

    manifest: Manifest
    rows: tuple[KindRow, ...]
    devices: tuple[Device, ...]
    examples: tuple[Example, ...]
    calibration: dict[str, object] | None

    def to_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"

    def to_html(self) -> str:
        """Return the page. Text from a bundle or a model is escaped."""
        manifest = self.manifest
        title = f"{manifest.model}, {manifest.recipe}, {manifest.export_format}"
        parts = [
            f"<h1>{_text(title)}</h1>",
            f"<p>Drafter {_text(manifest.drafter_recipe)}, context {manifest.context_length} tokens, up to "
            f"{manifest.num_draft_tokens} drafts a round, position offset {manifest.drafter_position_offset}.</p>",
            "<h2>Size</h2>",
            _table(("file", "MB"), [(e.path, f"{e.size_bytes / 1e6:.2f}") for e in manifest.files.values()]),
            "<h2>Is it the same model?</h2>",
            self._quality(),
            "<h2>Drafts</h2>",
            _table(
                (
                    "kind",
                    "K",
                    "rounds",
                    "accepted at position 1, 2, … (%)",
                    "committed a round",
                    "measured",
                ),
                [_row_cells(row) for row in self.rows],
            ),
            _acceptance_chart(self.rows),
            *(self._device(device) for device in self.devices),
            "<h2>Examples</h2><p>"
            + " ".join(f'<span class="{origin}">{origin}</span>' for origin in _ORIGINS)
            + "</p>",
            *(_example(example) for example in self.examples),
        ]
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{_text(title)}</title><style>{_STYLE}</style></head><body>\n'
            + "\n".join(parts)
            + "\n</body></html>\n"
        )

    def _device(self, device: Device) -> str:
        costs = device.costs
        passes = [("decode", costs.decode_ms)] + ([] if costs.draft_ms is None else [("draft", costs.draft_ms)])
        passes += [(f"round, K = {k}", ms) for k, ms in costs.rounds_ms.items()]
        return (
            f"<h2>Does it pay on {_text(device.name)}?</h2>"
            f"<p>{_text(device.advice[:1].upper() + device.advice[1:])}.</p>"
            + _table(
                ("kind", "K", "expected"),
                [(one.kind, str(one.num_draft_tokens), f"{one.speed_up:.2f}x") for one in device.expected],
            )
            + _table(("", "ms"), [(name, f"{ms:.3f}") for name, ms in passes])
            + _table(
                ("K", "pays from an acceptance of"),
                [(str(k), "never" if a is None else f"{a:.0%}") for k, a in device.break_even.items()],
            )
            + _speed_chart(costs)
        )

    def _quality(self) -> str:
        if self.calibration is None:
            return "<p>Not measured: run <code>mtp-export calibrate</code> on this bundle first.</p>"
        quality, verdict = (_mapping(self.calibration[key]) for key in ("quality", "verdict"))
        passed = bool(self.calibration["passed"])
        rows = [
            (name, f"{quality[key]:.4g}")
            for name, key in (
                ("KL per token against float", "kl_per_token"),
                ("of it by the weights alone", "weights_kl_per_token"),
                ("same first choice", "top1_agreement"),
                ("perplexity", "perplexity"),
                ("perplexity of the float model", "float_perplexity"),
            )
        ]
        hops = [(name, f"{error:.3g}") for name, error in _mapping(quality["hops"]).items()]
        layers = [(str(e["layer"]), f"{e['kl']:.3g}") for e in map(_mapping, _sequence(quality["layers"]))]
        findings = [_mapping(finding) for finding in _sequence(verdict["findings"])]
        reasons = [str(bar) for bar in _sequence(verdict["missed"])]
        reasons += [f"{finding['part']}: {finding['diagnosis']}" for finding in findings]
        return (
            f'<p class="{"passed" if passed else "failed"}">{"Passed" if passed else "Failed"}</p>'
            + "".join(f"<p>{_text(line)}</p>" for line in reasons)
            + _table(("", ""), rows)
            + "<h3>Relative error by hop</h3>"
            + _table(("hop", "error"), hops)
            + "<h3>KL with one part quantised</h3>"
            + _table(("part", "KL"), layers)
        )


def _mapping(value: object) -> Mapping[str, object]:
    assert isinstance(value, Mapping)
    return value


def _sequence(value: object) -> Sequence[object]:
    assert isinstance(value, Sequence)
    return value


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>"


def _row_cells(row: KindRow) -> tuple[str, ...]:
    return (
        row.kind,
        str(row.num_draft_tokens),
        str(row.rounds),
        " ".join(f"{100 * share:.0f}" for share in row.accepted_at),
        f"{row.committed_per_round:.2f}",
        f"{row.speed_up:.2f}x",
    )


def _example(example: Example) -> str:
    marked = "".join(
        f'<span class="{origin}">{_text(piece)}</span>'
        for piece, origin in zip(example.pieces, example.origins, strict=True)
    )
    return f'<h3>{_text(example.prompt_id)}</h3><pre><span class="prompt">{_text(example.prompt)}</span>{marked}</pre>'


def _acceptance_chart(rows: Sequence[KindRow]) -> str:
    deepest = max(row.num_draft_tokens for row in rows)
    lines = {r.kind: list(enumerate(r.accepted_at, 1)) for r in rows if r.num_draft_tokens == deepest}
    return _chart(lines, (1.0, float(deepest)), (0.0, 1.0), "position of the draft", f"accepted, K = {deepest}")


def _speed_chart(costs: Costs) -> str:
    shares = [i / 20 for i in range(21)]
    lines = {
        f"K = {k}": [(a, costs.expected_speed_up(expected_committed(a, k), k)) for a in shares] for k in costs.rounds_ms
    }
    top = max(y for line in lines.values() for _, y in line)
    return _chart(lines, (0.0, 1.0), (0.0, max(1.2, top)), "acceptance of a draft", "speed-up", rule=1.0)


def _chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    across: tuple[float, float],
    up: tuple[float, float],
    label: str,
    title: str,
    rule: float | None = None,
) -> str:
    """Return a line chart as SVG."""

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - across[0]) / max(1e-9, across[1] - across[0])
        return _LEFT + right * (_WIDTH - _LEFT - 90), (_HEIGHT - _BOTTOM) * (1 - (y - up[0]) / (up[1] - up[0])) + 5

    marks = []
    for i in range(5):
        value = up[0] + i * (up[1] - up[0]) / 4
        x, y = place(across[0], value)
        end = place(across[1], value)[0]
        marks.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        marks.append(f'<text x="2" y="{y + 4:.1f}">{value:.2f}</text>')
    for value in across:
        x, y = place(value, up[0])
        marks.append(f'<text x="{x - 6:.1f}" y="{y + 14:.1f}">{value:g}</text>')
    if rule is not None:
        (x, y), (end, _) = place(across[0], rule), place(across[1], rule)
        marks.append(
            f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}" stroke="#000" stroke-dasharray="4"/>'
        )
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        joined = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        marks.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        marks.append(f'<text x="{_WIDTH - 84}" y="{16 + 15 * number}" fill="{colour}">{_text(name)}</text>')
    marks.append(f'<text x="{_LEFT}" y="{_HEIGHT + 14}">{_text(label)}</text>')
    return (
        f'<figure><figcaption>{_text(title)}</figcaption><svg width="{_WIDTH}" height="{_HEIGHT + 20}" role="img">'
        + "".join(marks)
        + "</svg></figure>"
    )
