"""Nights: which are due, which are unlike the others, which may go, and how they look."""

import datetime as dt
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.config.nightly import DriftConfig
from pipeline.errors import DamageError, UserError
from pipeline.evaluate.evaluation import Evaluation, Terms, require_comparable, table
from pipeline.evaluate.figures import Figure
from pipeline.evaluate.history import (
    Night,
    dates_to_make,
    drift,
    expired,
    night_seed,
    read_nights,
    write_night,
)
from pipeline.evaluate.page import render
from pipeline.store import open_store

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
        terms=Terms(count=count, reference_digest="r", reference_count=50, network="n", settings="s"),
        metrics={"frechet": Figure(value=frechet, n=count, n_reference=50)},
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


def test_without_dates_the_nights_since_the_latest_are_due() -> None:
    assert dates_to_make(None, DAY, None, None, 7) == [DAY]
    assert dates_to_make(DAY - dt.timedelta(3), DAY, None, None, 7) == [
        DAY - dt.timedelta(n) for n in (2, 1, 0)
    ]
    assert dates_to_make(DAY - dt.timedelta(30), DAY, None, None, 2) == [DAY - dt.timedelta(1), DAY]
    assert dates_to_make(DAY, DAY, None, None, 7) == [DAY]


def test_told_dates_are_made_both_ends_included() -> None:
    assert len(dates_to_make(None, DAY, DAY - dt.timedelta(2), DAY, 1)) == 3
    assert dates_to_make(None, DAY, None, DAY, 1) == [DAY]
    assert dates_to_make(None, DAY, DAY, DAY - dt.timedelta(1), 1) == []


def test_no_two_nights_and_no_two_seeds_share_their_noise() -> None:
    seeds = {night_seed(seed, DAY + dt.timedelta(n)) for seed in range(5) for n in range(400)}
    assert len(seeds) == 2000


def test_a_night_unlike_the_others_is_drift_and_a_usual_one_is_not() -> None:
    before = [night(n, 1 + 0.01 * (n % 3)) for n in range(7)]
    assert drift(evaluation(1.02), before, DriftConfig()) == ()
    (line,) = drift(evaluation(1.5), before, DriftConfig())
    assert line.startswith("frechet is 1.5")


def test_two_nights_or_nights_on_other_terms_are_no_yardstick() -> None:
    assert drift(evaluation(9.0), [night(0), night(1)], DriftConfig()) == ()
    assert drift(evaluation(9.0, count=200), [night(n) for n in range(7)], DriftConfig()) == ()


def test_a_tiny_change_after_steady_nights_is_no_drift() -> None:
    assert drift(evaluation(1.05), [night(n) for n in range(7)], DriftConfig()) == ()


def test_retention_spares_the_newest_and_the_one_that_consumers_read() -> None:
    nights = [night(n) for n in range(5)]
    gone = expired(nights, nights[0].date, DAY, keep_nights=2, keep_days=None)
    assert [n.date for n in gone] == [nights[2].date, nights[1].date]
    old = expired(nights, nights[4].date, DAY + dt.timedelta(4), keep_nights=None, keep_days=2)
    assert [n.date for n in old] == [nights[1].date, nights[0].date]
    assert expired(nights, None, DAY, None, None) == []
    assert expired([night(0, deleted=True), night(1)], None, DAY, 1, None) == []


def test_records_are_read_back_in_order_and_damage_is_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for days in (2, 0, 1):
        write_night(store, night(days))
    assert [n.date for n in read_nights(store)] == [DAY + dt.timedelta(n) for n in range(3)]
    store.write("history/2026-03-11.json", b"{}")
    with pytest.raises(DamageError, match="2026-03-11"):
        read_nights(store)


def test_figures_on_unequal_terms_are_not_compared() -> None:
    require_comparable(evaluation(1), evaluation(2))
    with pytest.raises(UserError, match="count is 100 and 200"):
        require_comparable(evaluation(), evaluation(count=200))


def test_two_evaluations_stand_side_by_side() -> None:
    lines = table(evaluation(1.5), evaluation(2.25))
    assert lines[3] == "against    s  (model m/1)"
    assert lines[-1].split()[:4] == ["frechet", "1.5", "2.25", "100"]
    assert "2.25" not in "".join(table(evaluation(1.5)))


def test_the_page_tells_of_every_night_and_escapes_what_it_is_told() -> None:
    page = render(
        "<nights>", [night(0), night(1, 2.0, drifted=("frechet <up>",))], {"2026-03-11": b"png"}
    ).decode()
    assert page.count("<circle") == 2 * 3
    assert "&lt;nights&gt;" in page
    assert "frechet &lt;up&gt;" in page
    assert "2026-03-10" in page
    assert page.count('text-anchor="end">100<') == 1  # a count that is always the same is written once
    wide = page[page.index("<table>") :]
    assert wide.index("frechet &lt;up&gt;") < wide.index(
        "2026-03-10"
    )  # beneath its night, over the whole width
    assert "<script" not in page
    assert "No night" in render("t", [], {}).decode()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at the page with")
def test_a_real_browser_draws_the_page(tmp_path: Path) -> None:
    file = tmp_path / "index.html"
    file.write_bytes(render("nights", [night(n, 1 + 0.1 * n) for n in range(5)], {}))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
    ]
    shot = [*command, f"--screenshot={tmp_path}/page.png", "--window-size=1200,1000", file.as_uri()]
    subprocess.run(shot, check=True, capture_output=True, timeout=100)
    assert (tmp_path / "page.png").stat().st_size > 10_000
    done = subprocess.run(
        [*command, "--dump-dom", file.as_uri()], check=True, capture_output=True, timeout=100
    )
    dom = done.stdout.decode()
    assert dom.count("<circle") == 5 * 3
    assert "<polyline" in dom
