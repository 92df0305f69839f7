"""The history page: the metrics of every night as charts and a table, and the newest contact sheets. No script."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.generate.cost import Cost, amount
from pipeline.html_page import render_page
from pipeline.nightly.history import Night

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 150, 60, 10, 12, 26
"""Size of a chart and its margins, pixels."""
_PADDING = 0.08
"""Space above the largest and below the smallest value, as a share of their difference."""
Series = Callable[[Night], float | None]


def render_history(title: str, nights: Sequence[Night], sheets: Mapping[str, bytes]) -> bytes:
    """The page. `nights` oldest first; `sheets` are PNGs by date, newest first."""
    columns = {
        metric: heading
        for metric, heading in _METRIC_COLUMNS.items()
        if any(metric in night.evaluation.metrics for night in nights)
    }
    costs = [heading for heading, of in _COST_COLUMNS.items() if any(of(n.cost) for n in nights if n.cost)]
    return render_page(
        "history.html",
        title=title,
        latest=nights[-1] if nights else None,
        num_nights=len(nights),
        num_samples=sum(night.count for night in nights),
        charts=[chart for chart in (_chart(*about, nights) for about in _CHARTS) if chart.marks],
        columns=["night", "model", "samples", *columns.values(), "images/s", *costs, "N of reference"],
        rows=[_Row(_cells(night, list(columns), costs), night.drift) for night in reversed(nights)],
        sheets=sheets,
    )


@dataclass(frozen=True)
class _Row:
    cells: list[str]
    drift: tuple[str, ...]


@dataclass(frozen=True)
class _Mark:
    x: float
    y: float
    label: str
    drift: bool


@dataclass(frozen=True)
class _GridLine:
    y: float
    label: str


@dataclass(frozen=True)
class _DateLabel:
    x: float
    anchor: str
    label: str


@dataclass(frozen=True)
class _Chart:
    """A line chart in pixels, origin top left."""

    name: str
    note: str
    marks: list[_Mark]
    grid_lines: list[_GridLine]
    dates: list[_DateLabel]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT


def _chart(name: str, note: str, series: Series, nights: Sequence[Night]) -> _Chart:
    """A chart of one value a night; without marks where no night has it."""
    points = [(place, value) for place, night in enumerate(nights) if (value := series(night)) is not None]
    values = [value for _, value in points]
    low, high = min(values, default=0.0), max(values, default=0.0)
    padding = _PADDING * ((high - low) or abs(high) or 1.0)
    bottom, top = low - padding, high + padding
    last = len(nights) - 1

    def x(place: int) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (place / last if last else 0.5), 1)

    def y(value: float) -> float:
        return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - bottom) / (top - bottom)), 1)

    ends = {0: "start", last: "end"} if last else {0: "middle"}
    return _Chart(
        name,
        note,
        marks=[
            _Mark(x(place), y(value), f"{nights[place].date}: {value:.4g}", bool(nights[place].drift))
            for place, value in points
        ],
        grid_lines=[_GridLine(y(value), f"{value:.4g}") for value in dict.fromkeys((low, high))],
        dates=[
            _DateLabel(x(place), anchor, str(nights[place].date)) for place, anchor in ends.items() if nights
        ],
    )


def _cells(night: Night, metrics: Sequence[str], costs: Sequence[str]) -> list[str]:
    """A row of the table."""
    values = [_value(night, metric) for metric in metrics]
    return [
        f"{night.date}" + (" (deleted)" if night.deleted else ""),
        night.model,
        f"{night.count:,}",
        *("" if value is None else _number(value) for value in values),
        f"{night.images_per_second:.1f}",
        *("" if night.cost is None else _COST_COLUMNS[heading](night.cost) for heading in costs),
        f"{night.evaluation.terms.reference_count:,}",
    ]


def _number(value: float) -> str:
    """With as many decimals as the other cells of its column, so that a column can be compared at a glance."""
    return "0" if value == 0 else f"{value:.4f}" if abs(value) >= 5e-5 else f"{value:.1e}"


def _value(night: Night, name: str) -> float | None:
    metric = night.evaluation.metrics.get(name)
    return None if metric is None else metric.value


def _money(cost: Cost) -> str:
    """With its currency: the price may have been another one in another night."""
    return "" if cost.money_per_1000 is None else f"{amount(cost.money_per_1000)} {cost.price.currency}"


def _known(value: float | None) -> str:
    return "" if value is None else amount(value)


_CHARTS: tuple[tuple[str, str, Series], ...] = (
    ("Fréchet distance", "lower is better", lambda night: _value(night, "frechet")),
    (
        "Distance against two real halves",
        "1 is as good as real data",
        lambda night: _value(night, "frechet_ratio"),
    ),
    ("Class accuracy", "higher is better", lambda night: _value(night, "class_accuracy")),
    ("Near duplicates of training images", "share of samples", lambda night: _value(night, "near_copies")),
    ("Samples", "images", lambda night: float(night.count)),
    ("Throughput", "images per device second", lambda night: night.images_per_second),
    (
        "Device time",
        "device seconds per 1,000 images",
        lambda night: night.cost and night.cost.device_seconds_per_1000,
    ),
    ("Price", "per 1,000 images", lambda night: night.cost and night.cost.money_per_1000),
)
_COST_COLUMNS: dict[str, Callable[[Cost], str]] = {
    "evaluations/image": lambda cost: _known(cost.evaluations_per_image),
    "device s per 1,000": lambda cost: _known(cost.device_seconds_per_1000),
    "J per 1,000": lambda cost: _known(cost.joules_per_1000),
    "price per 1,000": _money,
}
_METRIC_COLUMNS = {
    "frechet": "Fréchet distance",
    "frechet_ratio": "against halves",
    "kernel": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
    "near_copies": "near duplicates",
    "duplicates": "duplicates",
}
