"""Line charts of one value a day: scales, ticks and labels, in pixels for a template to draw."""

import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH, HEIGHT = 360, 170
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 26
"""Margins, pixels."""
_MAX_Y_TICKS = 5
_MAX_X_TICKS = 4
_LOG_FROM = 10.0
"""A series that may have a log scale gets one when its largest value is this many times its smallest."""
_SMALL_DOTS_FROM = 60
Unit = Literal["", "%"]


@dataclass(frozen=True)
class Day:
    """A value of one day."""

    date: dt.date
    value: float
    drift: bool = False


@dataclass(frozen=True)
class Mark:
    """A point of the line, with its text for a pointer that rests on it."""

    x: float
    y: float
    label: str
    drift: bool


@dataclass(frozen=True)
class Tick:
    """A place on an axis and its text."""

    at: float
    label: str
    anchor: str = "end"


@dataclass(frozen=True)
class Chart:
    """A line chart in pixels, origin top left."""

    name: str
    note: str
    latest: str
    marks: list[Mark]
    y_ticks: list[Tick]
    x_ticks: list[Tick]
    radius: float
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class _Scale:
    """Values to places between 0 (low) and 1 (high)."""

    ticks: list[float]
    low: float
    high: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def line_chart(
    name: str, note: str, days: Sequence[Day], *, unit: Unit = "", may_be_log: bool = False
) -> Chart:
    """A chart of at least one day, ascending by date. Values in "%" are shares, shown times 100.

    `may_be_log`: losses and distances get a log scale where they span a factor of ten or more.
    """
    factor = 100.0 if unit == "%" else 1.0
    values = [factor * day.value for day in days]
    low, high = min(values), max(values)
    is_log = may_be_log and low > 0 and high >= _LOG_FROM * low
    scale = _log_scale(low, high) if is_log else _linear_scale(low, high)
    tick_labels = _labels(scale, unit)
    return Chart(
        name,
        f"{note}, log scale" if is_log else note,
        latest=_text(values[-1], unit),
        marks=[
            Mark(_x(day.date, days), _y(scale(value)), f"{day.date}: {_text(value, unit)}", day.drift)
            for day, value in zip(days, values, strict=True)
        ],
        y_ticks=[Tick(_y(scale(tick)), label) for tick, label in zip(scale.ticks, tick_labels, strict=True)],
        x_ticks=list(_date_ticks(days)),
        radius=3.5 if len(days) < _SMALL_DOTS_FROM else 2,
    )


def _linear_scale(low: float, high: float) -> _Scale:
    from matplotlib.ticker import MaxNLocator  # takes a while to import

    if low == high:
        margin = abs(high) / 10 or 1.0
        return _Scale([high], low - margin, high + margin)
    locator = MaxNLocator(_MAX_Y_TICKS - 1, steps=[1, 2, 2.5, 5, 10])
    ticks = [float(tick) for tick in locator.tick_values(low, high)]
    return _Scale(ticks, ticks[0], ticks[-1])


def _log_scale(low: float, high: float) -> _Scale:
    """Powers of ten that enclose the values; of very many, every second, third, …"""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / (_MAX_Y_TICKS - 1)))
    ticks = [10.0**power for power in range(first, last + 1, step)]
    return _Scale(ticks, 10.0**first, max(high, ticks[-1]), is_log=True)


def _labels(scale: _Scale, unit: Unit) -> list[str]:
    """Texts of the ticks: on a linear axis all with as many decimals as the finest of them needs."""
    if scale.is_log or len(scale.ticks) == 1:
        return [_text(tick, unit) for tick in scale.ticks]
    step = scale.ticks[1] - scale.ticks[0]
    decimals = next(
        (n for n in range(9) if all(abs(round(tick, n) - tick) < step / 100 for tick in scale.ticks)), 9
    )
    return [f"{tick:,.{decimals}f}{unit}" for tick in scale.ticks]


def _text(value: float, unit: Unit) -> str:
    if unit == "%":
        return f"{value:.2f}".rstrip("0").rstrip(".") + unit
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _x(date: dt.date, days: Sequence[Day]) -> float:
    span = (days[-1].date - days[0].date).days
    share = (date - days[0].date).days / span if span else 0.5
    return round(LEFT + (WIDTH - LEFT - RIGHT) * share, 1)


def _y(share: float) -> float:
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - share), 1)


def _date_ticks(days: Sequence[Day]) -> list[Tick]:
    """The last date, and others at equal distances before it."""
    span = (days[-1].date - days[0].date).days
    step = max(1, math.ceil(span / (_MAX_X_TICKS - 1)))
    dates = [days[-1].date - dt.timedelta(back) for back in range(0, span + 1, step)][::-1]
    ticks: list[Tick] = []
    for date in dates:
        x = _x(date, days)
        anchor = "end" if x > WIDTH - RIGHT - 30 else "start" if x < LEFT + 10 else "middle"
        ticks.append(Tick(x, str(date), anchor))
    return ticks
