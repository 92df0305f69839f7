"""Nights: pending dates, drift, retention, records and the history page."""

import datetime as dt
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ddpm_pipeline.config.cost import CostConfig
from ddpm_pipeline.config.nights import DriftConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.document import (
    Evaluation,
    EvaluationConditions,
    Metric,
    require_comparable,
    table,
)
from ddpm_pipeline.generate.generation_cost import Cost
from ddpm_pipeline.nightly.history import (
    Night,
    advance_latest,
    drift,
    newest,
    night_seed,
    pending_dates,
    read_latest,
    read_night,
    read_nights,
    today_by,
    write_latest,
    write_night,
)
from ddpm_pipeline.nightly.history_page import render_history
from ddpm_pipeline.nightly.line_chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Day, line_chart
from ddpm_pipeline.nightly.retention import select_for_retention
from ddpm_pipeline.store import FileStore, ObjectInfo, open_store
from tests.browser import document, needs_browser, screenshot

DAY = dt.date(2026, 3, 10)


def evaluation(frechet: float = 1.0, count: int = 100) -> Evaluation:
    return Evaluation(
        subject="s",
        model="m/1",
        model_sha256="0",
        spec_digest="d",
        sampler=None,
        reference="r",
        network_label="n",
        terms=EvaluationConditions(
            count=count, reference_digest="r", reference_count=50, network="n", settings="s"
        ),
        metrics={"frechet": Metric(value=frechet, n=count, n_reference=50)},
        made_at=0,
    )


def night(days: int, frechet: float = 1.0, deleted: bool = False, drifted: tuple[str, ...] = ()) -> Night:
    date = DAY + dt.timedelta(days=days)
    return Night(
        date=date,
        prefix=f"p/date={date}",
        spec_digest="d",
        model="m/1",
        count=100,
        images_per_second=5.0,
        evaluation=evaluation(frechet),
        drift=drifted,
        deleted=deleted,
    )


def test_without_dates_the_nights_since_the_latest_are_pending() -> None:
    assert pending_dates(None, DAY, None, None, 7) == [DAY]
    assert pending_dates(DAY - dt.timedelta(3), DAY, None, None, 7) == [
        DAY - dt.timedelta(n) for n in (2, 1, 0)
    ]
    assert pending_dates(DAY - dt.timedelta(30), DAY, None, None, 2) == [DAY - dt.timedelta(1), DAY]
    assert pending_dates(DAY, DAY, None, None, 7) == [DAY]


def test_given_dates_are_made_including_both_ends() -> None:
    assert len(pending_dates(None, DAY, DAY - dt.timedelta(2), DAY, 1)) == 3
    assert pending_dates(None, DAY, None, DAY, 1) == [DAY]
    assert pending_dates(None, DAY, DAY, DAY - dt.timedelta(1), 1) == []


def test_no_two_nights_and_no_two_seeds_share_a_seed() -> None:
    seeds = {night_seed(seed, DAY + dt.timedelta(n)) for seed in range(5) for n in range(400)}
    assert len(seeds) == 2000


def test_a_night_unlike_the_others_is_drift_and_a_usual_one_is_not() -> None:
    before = [night(n, 1 + 0.01 * (n % 3)) for n in range(7)]
    assert drift(evaluation(1.02), before, DriftConfig()) == ()
    (line,) = drift(evaluation(1.5), before, DriftConfig())
    assert line.startswith("frechet is 1.5")


def test_two_nights_or_nights_under_other_conditions_give_no_drift() -> None:
    assert drift(evaluation(9.0), [night(0), night(1)], DriftConfig()) == ()
    assert drift(evaluation(9.0, count=200), [night(n) for n in range(7)], DriftConfig()) == ()


def test_a_tiny_change_after_steady_nights_is_no_drift() -> None:
    assert drift(evaluation(1.05), [night(n) for n in range(7)], DriftConfig()) == ()


def test_retention_selects_the_nights_beyond_the_newest_and_the_older_ones() -> None:
    nights = [night(n) for n in range(5)]
    today = DAY + dt.timedelta(4)
    assert select_for_retention(nights, today, keep_nights=2, keep_days=None) == nights[2::-1]
    assert select_for_retention(nights, today, keep_nights=None, keep_days=2) == nights[1::-1]
    assert select_for_retention(nights, today, None, None) == []
    assert select_for_retention([night(0, deleted=True), night(1)], DAY + dt.timedelta(1), 1, None) == []


def test_a_night_of_the_future_is_neither_counted_nor_selected_nor_the_newest() -> None:
    nights = [night(0), night(1), night(400)]
    today = DAY + dt.timedelta(1)
    assert select_for_retention(nights, today, keep_nights=2, keep_days=30) == []
    assert newest(nights, today) == nights[1]
    assert newest([], today) is None


@pytest.mark.parametrize(("first", "last"), [(1, 1), (None, 1), (0, 1), (1, None), (1, 0)])
def test_dates_in_the_future_are_refused(first: int | None, last: int | None) -> None:
    begin, end = (None if days is None else DAY + dt.timedelta(days) for days in (first, last))
    with pytest.raises(UserError, match="2026-03-11 lies in the future"):
        pending_dates(DAY, DAY, begin, end, 7)


def test_a_clock_that_jumps_by_months_needs_dates() -> None:
    far = DAY + dt.timedelta(400)
    with pytest.raises(UserError, match=r"2027-04-14, 400 days later; .*--from 2027-04-14"):
        pending_dates(DAY, far, None, None, 7)
    assert pending_dates(DAY, far, far, None, 7) == [far]


def test_a_clock_that_differs_from_the_stores_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    now = dt.datetime.now(dt.UTC)
    assert abs((today_by(store, now) - now.date()).days) <= 1
    for wrong in (dt.timedelta(days=400), dt.timedelta(hours=-2)):
        with pytest.raises(UserError, match=r"clock: this machine says .* set the wrong one"):
            today_by(store, now + wrong)


def test_latest_follows_the_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, today = open_store(str(tmp_path)), DAY + dt.timedelta(9)
    assert advance_latest(store, today) is None
    for days in (3, 1, 2):
        write_night(store, night(days))
        latest = advance_latest(store, today)
        assert latest is not None
        assert latest.date == DAY + dt.timedelta(3)
    write_latest(store, night(1))  # by a delayed job
    assert advance_latest(store, today) == read_latest(store) == night(3)
    store.write("latest.json", b"{")
    assert advance_latest(store, today) == read_latest(store) == night(3)
    assert "latest.json: not a night's record" in caplog.text
    write_latest(store, night(400))
    assert advance_latest(store, today) == read_latest(store) == night(3)
    assert "which lies in the future" in caplog.text
    write_latest(store, night(5))  # its record is gone, yet consumers have seen it
    assert advance_latest(store, today) == read_latest(store) == night(5)


class DelayedStore(FileStore):
    """A store on which another job records a later night just before latest.json is written."""

    def write(self, key: str, data: bytes, *, replaces: str | None = None) -> ObjectInfo:
        if key == "latest.json" and read_night(self, DAY + dt.timedelta(7)) is None:
            other = FileStore(self.root)
            write_night(other, night(7))
            advance_latest(other, DAY + dt.timedelta(9))
        return super().write(key, data, replaces=replaces)


def test_a_job_delayed_before_it_writes_latest_ends_with_the_newest_night(tmp_path: Path) -> None:
    store = DelayedStore(tmp_path)
    write_night(store, night(2))
    assert advance_latest(store, DAY + dt.timedelta(9)) == read_latest(store) == night(7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 0),
        ("count", 2**80),
        ("images_per_second", -1),
        ("date", "+99999-01-01"),
        ("prefix", "x" * 9999),
    ],
)
def test_a_record_with_numbers_out_of_range_is_ignored(
    tmp_path: Path, field: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    store.write(
        "history/2026-03-10.json", json.dumps(night(0).model_dump(mode="json") | {field: value}).encode()
    )
    assert read_night(store, DAY) is None
    assert f"not a night's record ({field}: " in caplog.text


def test_records_are_read_in_order_and_damaged_ones_are_named_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    for days in (2, 0, 1):
        write_night(store, night(days))
    assert [n.date for n in read_nights(store)] == [DAY + dt.timedelta(n) for n in range(3)]
    store.write("history/2026-03-11.json", b"{}")
    store.write("history/2026-03-10.json", store.read("history/2026-03-12.json"))
    store.write("history/notes.json", b"a user's")
    assert [n.date for n in read_nights(store)] == [DAY + dt.timedelta(2)]
    assert "history/2026-03-11.json: not a night's record" in caplog.text
    assert "to make it again: ddpm nightly --from 2026-03-11 --to 2026-03-11" in caplog.text
    assert "history/2026-03-10.json: holds the record of 2026-03-12: it is ignored" in caplog.text
    assert "notes" not in caplog.text


def test_evaluations_under_unequal_conditions_are_not_compared() -> None:
    require_comparable(evaluation(1), evaluation(2))
    with pytest.raises(UserError, match="count is 100 and 200"):
        require_comparable(evaluation(), evaluation(count=200))


def test_two_evaluations_are_shown_side_by_side() -> None:
    lines = table(evaluation(1.5), evaluation(2.25))
    assert lines[3] == "against    s  (model m/1)"
    assert lines[-1].split()[:4] == ["frechet", "1.5", "2.25", "100"]
    assert "2.25" not in "".join(table(evaluation(1.5)))


def test_the_page_shows_every_night_and_escapes_its_texts() -> None:
    page = render_history(
        "<nights>", [night(0), night(1, 2.0, drifted=("frechet <up>",))], {"2026-03-11": b"png"}
    ).decode()
    assert page.count("<circle") == 2 * 3
    assert "&lt;nights&gt;" in page
    assert "frechet &lt;up&gt;" in page
    assert "2026-03-10" in page
    assert page.count('text-anchor="end">100<') == 1  # a count that is always the same is written once
    wide = page[page.index("<table") :]
    assert wide.index("frechet &lt;up&gt;") < wide.index(
        "2026-03-10"
    )  # beneath its night, over the whole width
    assert "<script" not in page
    assert "No night" in render_history("t", [], {}).decode()


def test_the_charts_are_well_formed_and_their_points_inside_them() -> None:
    nights = [night(0, 1.0), night(1, 2.0, drifted=("<&>",)), night(2, 3.0)]
    page = render_history("t", nights, {}).decode()
    assert page == render_history("t", nights, {}).decode()
    charts = [ElementTree.fromstring(text) for text in re.findall("<svg.*?</svg>", page, re.DOTALL)]
    assert [chart.get("aria-label") for chart in charts] == ["Fréchet distance", "Samples", "Throughput"]
    for chart in charts:
        points = [(float(mark.get("cx", "")), float(mark.get("cy", ""))) for mark in chart.iter("circle")]
        assert [f"{x},{y}" for x, y in points] == chart.find("polyline").get("points").split()  # type: ignore[union-attr]
        assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in points)
    heights = [float(mark.get("cy", "")) for mark in charts[0].iter("circle")]
    assert heights == sorted(
        heights, reverse=True
    )  # larger values are drawn higher, and SVG counts from the top
    assert [mark.get("fill") for mark in charts[0].iter("circle")] == [
        "var(--line)",
        "var(--bad)",
        "var(--line)",
    ]
    assert [title.text for title in charts[0].iter("title")] == [
        "2026-03-10: 1",
        "2026-03-11: 2",
        "2026-03-12: 3",
    ]


def days(*values: float, gap: int = 1) -> list[Day]:
    return [Day(DAY + dt.timedelta(gap * n), value) for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.2818, 0.3352), ["0.28", "0.30", "0.32", "0.34"]),
        ((13.9, 16.7, 15.0), ["13", "14", "15", "16", "17"]),
        ((1000.0, 1000.0), ["1,000"]),
        ((0.0,), ["0"]),
        ((-0.04, -0.01), ["-0.04", "-0.03", "-0.02", "-0.01"]),
        ((800.0, 2400.0), ["500", "1,000", "1,500", "2,000", "2,500"]),
    ],
)
def test_an_axis_has_a_few_round_ticks_that_enclose_the_values(
    values: tuple[float, ...], ticks: list[str]
) -> None:
    chart = line_chart("name", "note", days(*values))
    assert [tick.label for tick in chart.y_ticks] == ticks
    places = [tick.at for tick in chart.y_ticks]
    assert places == sorted(places, reverse=True)
    assert all(TOP <= mark.y <= HEIGHT - BOTTOM for mark in chart.marks)


def test_a_loss_that_spans_a_factor_of_ten_has_a_log_scale() -> None:
    chart = line_chart("Loss", "lower is better", days(30.0, 3.0, 0.3), may_be_log=True)
    assert chart.note == "lower is better, log scale"
    assert [tick.label for tick in chart.y_ticks] == ["0.1", "1", "10", "100"]
    first, second, third = (mark.y for mark in chart.marks)
    assert second - first == pytest.approx(third - second, abs=0.2)
    assert line_chart("Loss", "x", days(9.0, 1.0), may_be_log=True).note == "x"
    assert line_chart("Loss", "x", days(9.0, 0.0), may_be_log=True).note == "x"
    assert line_chart("Count", "x", days(90.0, 1.0)).note == "x"


def test_shares_are_percent_and_dates_stand_at_their_distance() -> None:
    chart = line_chart("Accuracy", "", [*days(0.991, 0.995), Day(DAY + dt.timedelta(9), 0.993)], unit="%")
    assert chart.latest == "99.3%"
    assert chart.marks[0].label == "2026-03-10: 99.1%"
    assert [tick.label for tick in chart.y_ticks] == ["99.0%", "99.2%", "99.4%", "99.6%"]
    first, second, third = (mark.x for mark in chart.marks)
    assert (second - first) * 9 == pytest.approx(third - first, abs=0.5)
    assert [tick.label for tick in chart.x_ticks] == ["2026-03-10", "2026-03-13", "2026-03-16", "2026-03-19"]
    assert len(line_chart("n", "", days(*range(1, 900))).x_ticks) <= 4


def test_the_page_shows_what_nights_cost_and_leaves_out_what_no_night_knows() -> None:
    dear = Cost(
        evaluations_per_image=20,
        images=100,
        device_seconds=8.0,
        price=CostConfig(per_device_hour=4.5, currency="EUR"),
    )
    cheap = dear.model_copy(update={"price": CostConfig(), "evaluations_per_image": 4})
    nights = [
        night(0),
        night(1).model_copy(update={"cost": cheap}),
        night(2).model_copy(update={"cost": dear}),
    ]
    page = render_history("t", nights, {}).decode()
    headings = re.findall("<th>(.*?)</th>", page)
    assert headings[-4:] == ["evaluations/image", "device s per 1,000", "price per 1,000", "N of reference"]
    rows = [re.findall("<td>(.*?)</td>", row)[-4:] for row in page.split("<tr>")[2:]]
    assert rows == [["20", "80", "0.1 EUR", "50"], ["4", "80", "", "50"], ["", "", "", "50"]]
    assert page.count('aria-label="Device time"') == page.count('aria-label="Price"') == 1
    assert "evaluations/image" not in render_history("t", [night(0)], {}).decode()


def test_a_record_without_a_cost_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_night(store, night(0))
    document = json.loads(store.read("history/2026-03-10.json"))
    assert "cost" not in document
    assert read_night(store, DAY) == night(0)


@needs_browser
def test_a_real_browser_draws_the_page(tmp_path: Path) -> None:
    file = tmp_path / "index.html"
    file.write_bytes(render_history("nights", [night(n, 1 + 0.1 * n) for n in range(5)], {}))
    screenshot(file.as_uri(), tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    dom = document(file.as_uri(), tmp_path)
    assert dom.count("<circle") == 5 * 3
    assert "<polyline" in dom
