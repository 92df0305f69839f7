"""The history page: the metrics of every night as charts and a table, and the newest contact sheets. No script."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ddpm_pipeline.generate.generation_cost import Cost, amount
from ddpm_pipeline.html_page import render_page
from ddpm_pipeline.nightly.history import Night
from ddpm_pipeline.nightly.line_chart import Chart, Day, Unit, line_chart

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
        charts=[chart for chart in (about.chart(nights) for about in _CHARTS) if chart is not None],
        columns=["night", "model", "samples", *columns.values(), "images/s", *costs, "N of reference"],
        rows=[_Row(_cells(night, list(columns), costs), night.drift) for night in reversed(nights)],
        sheets=sheets,
    )


@dataclass(frozen=True)
class _Row:
    cells: list[str]
    drift: tuple[str, ...]


@dataclass(frozen=True)
class _About:
    """What is charted, one value a night."""

    name: str
    note: str
    series: Series
    unit: Unit = ""
    may_be_log: bool = False

    def chart(self, nights: Sequence[Night]) -> Chart | None:
        """The chart; None if no night has the value."""
        days = [
            Day(night.date, value, bool(night.drift))
            for night in nights
            if (value := self.series(night)) is not None
        ]
        if not days:
            return None
        return line_chart(self.name, self.note, days, unit=self.unit, may_be_log=self.may_be_log)


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


_CHARTS = (
    _About("Fréchet distance", "lower is better", lambda night: _value(night, "frechet"), may_be_log=True),
    _About(
        "Distance against two real halves",
        "1 is as good as real data",
        lambda night: _value(night, "frechet_ratio"),
        may_be_log=True,
    ),
    _About(
        "Class accuracy",
        "share of samples, higher is better",
        lambda night: _value(night, "class_accuracy"),
        unit="%",
    ),
    _About(
        "Near duplicates",
        "share of samples, of training images",
        lambda night: _value(night, "near_copies"),
        unit="%",
    ),
    _About("Samples", "images", lambda night: float(night.count)),
    _About("Throughput", "images per device second", lambda night: night.images_per_second),
    _About(
        "Device time",
        "device seconds per 1,000 images",
        lambda night: night.cost and night.cost.device_seconds_per_1000,
    ),
    _About("Price", "per 1,000 images", lambda night: night.cost and night.cost.money_per_1000),
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
