"""The history page: every night's figures as charts and a table, and the newest contact sheets. One file, no script."""

import base64
import html
from collections.abc import Callable, Mapping, Sequence

from pipeline.nightly.history import Night

_WIDTH, _HEIGHT, _LEFT, _TOP = 360, 150, 60, 12
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --line: #3b6ea5; --grid: #ddd; --bad: #b3261e; --back: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --line: #8ab4f8; --grid: #444; --bad: #f2b8b5; --back: #181818 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--back) }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1.2rem 2rem }
figure { margin: 0 } figcaption { font-weight: 600 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .2rem 0 .2rem .8rem; text-align: right; white-space: nowrap; vertical-align: bottom }
th { white-space: normal; line-height: 1.2 } th:first-child, td:first-child { text-align: left; padding-left: 0 }
tr { border-top: 1px solid var(--grid) } tr.said { border: 0 } .bad { color: var(--bad) }
td.bad { white-space: normal }
img { width: 100% } svg { width: 100%; height: auto }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink) }
"""
_CHARTS: tuple[tuple[str, str, Callable[[Night], float | None]], ...] = (
    ("Fréchet distance", "lower is better", lambda night: _figure(night, "frechet")),
    (
        "Distance against two real halves",
        "1 is as good as real data",
        lambda night: _figure(night, "frechet_ratio"),
    ),
    ("Class accuracy", "higher is better", lambda night: _figure(night, "class_accuracy")),
    ("Near-copies of training images", "share of samples", lambda night: _figure(night, "near_copies")),
    ("Samples", "images", lambda night: float(night.count)),
    ("Throughput", "images a device second", lambda night: night.images_per_second),
)
_COLUMNS = {
    "frechet": "Fréchet distance",
    "frechet_ratio": "against halves",
    "kernel": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
    "near_copies": "near-copies",
    "duplicates": "duplicates",
}


def render_history(title: str, nights: Sequence[Night], sheets: Mapping[str, bytes]) -> bytes:
    """The page. `nights` oldest first; `sheets` are PNGs by date, newest first."""
    parts = [f"<h1>{html.escape(title)}</h1>", _summary(nights)]
    charts = [_chart(name, note, nights, read) for name, note, read in _CHARTS]
    parts += ["<h2>Night by night</h2>", f"<div class=tiles>{''.join(charts)}</div>"]
    parts += ["<h2>All nights</h2>", _table(nights), "<h2>Contact sheets</h2>"]
    parts.append(f"<div class=tiles>{''.join(_sheet(date, sheet) for date, sheet in sheets.items())}</div>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    )
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n".encode()


def _summary(nights: Sequence[Night]) -> str:
    if not nights:
        return "<p>No night is complete yet.</p>"
    last = nights[-1]
    many = "1 night" if len(nights) == 1 else f"{len(nights)} nights"
    text = f"{many}, {sum(n.count for n in nights):,} samples. Latest: {last.date}, {last.model}."
    alarm = "".join(f"<li class=bad>{html.escape(line)}</li>" for line in last.drift)
    return f"<p>{html.escape(text)}</p>" + (
        f"<p>Unlike the nights before:</p><ul>{alarm}</ul>" if alarm else ""
    )


def _sheet(date: str, sheet: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(sheet).decode()}"
    image = f'<img alt="samples of {date}" src="{source}">'
    return f'<figure id="sheet-{date}"><figcaption>{date}</figcaption>{image}</figure>'


def _chart(name: str, note: str, nights: Sequence[Night], read: Callable[[Night], float | None]) -> str:
    points = [(place, value) for place, night in enumerate(nights) if (value := read(night)) is not None]
    if not points:
        return ""
    low, high = min(v for _, v in points), max(v for _, v in points)
    ends_of_scale = (low, high) if high > low else (low,)
    span = (high - low) or abs(high) or 1.0
    low, high = low - 0.08 * span, high + 0.08 * span

    def at(place: int, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - 10) * (place / max(1, len(nights) - 1) if len(nights) > 1 else 0.5)
        return x, _TOP + (_HEIGHT - 2 * _TOP - 14) * (1 - (value - low) / (high - low))

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
    marks = [_mark(nights[place], value, *at(place, value)) for place, value in points]
    scale = [_scale(value, at(0, value)[1]) for value in ends_of_scale]
    ends = {0: "start", len(nights) - 1: "end"} if len(nights) > 1 else {0: "middle"}
    dates = [
        f'<text x="{at(place, low)[0]:.1f}" y="{_HEIGHT - 4}" text-anchor="{anchor}">{nights[place].date}</text>'
        for place, anchor in ends.items()
    ]
    drawing = f'{"".join(scale)}<polyline points="{line}" fill="none" stroke="var(--line)" stroke-width="2"/>'
    return (
        f"<figure><figcaption>{html.escape(name)}</figcaption><small>{html.escape(note)}</small><br>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="{html.escape(name)}">'
        f"{drawing}{''.join(marks)}{''.join(dates)}</svg></figure>"
    )


def _mark(night: Night, value: float, x: float, y: float) -> str:
    colour = "var(--bad)" if night.drift else "var(--line)"
    told = f"<title>{night.date}: {value:.4g}</title>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">{told}</circle>'


def _scale(value: float, y: float) -> str:
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--grid)"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
    )


def _table(nights: Sequence[Night]) -> str:
    columns = {
        name: words
        for name, words in _COLUMNS.items()
        if any(name in night.evaluation.metrics for night in nights)
    }
    head = ["night", "model", "samples", *columns.values(), "images/s", "N of reference"]
    rows = [_row("th", head)]
    for night in reversed(nights):
        values = [_figure(night, name) for name in columns]
        cells = [f"{night.date}" + (" (deleted)" if night.deleted else ""), night.model, f"{night.count:,}"]
        cells += ["" if value is None else _number(value) for value in values]
        cells += [f"{night.images_per_second:.1f}", f"{night.evaluation.terms.reference_count:,}"]
        rows.append(_row("td", cells))
        if night.drift:
            told = html.escape("drift: " + "; ".join(night.drift))
            rows.append(f'<tr class=said><td class=bad colspan="{len(head)}">{told}</td></tr>')
    return f"<div class=wide><table>{''.join(rows)}</table></div>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _number(value: float) -> str:
    """With as many decimals as its neighbours above and below, so that a column can be read at a glance."""
    return "0" if value == 0 else f"{value:.4f}" if abs(value) >= 5e-5 else f"{value:.1e}"


def _figure(night: Night, name: str) -> float | None:
    figure = night.evaluation.metrics.get(name)
    return None if figure is None else figure.value
