"""What is measured is held against what was asked and against what was recorded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as bench

BAR = {
    "train": {"ours_over_theirs": {"asked": 1.1, "recorded": 1.2}, "wait": {"asked": 0.01, "recorded": 0.001}}
}

MACHINE = {"processor": "A", "cores": 2, "vectors": "AVX2", "python": "3.11.9", "version_torch": "2.13.0"}


def judged(median: float, spread: float = 0.02, wait: float = 0.001) -> list[bench.Verdict]:
    bars = {"train": {**BAR["train"], "wait": {**BAR["train"]["wait"], "at_least": False, "slack": 0.009}}}
    ratio = {"median": median, "low": median - spread, "high": median + spread, "pairs": 9}
    return bench.judge(bars, {"train": {"ours_over_theirs": ratio, "wait": wait, "cores": 2}})


@pytest.mark.parametrize(
    ("median", "spread", "reaches", "fell"),
    [
        (1.3, 0.02, True, False),
        (1.15, 0.02, True, False),  # within a twentieth
        (1.05, 0.02, False, True),
        (1.05, 0.2, False, False),  # within its own noise
    ],
)
def test_a_ratio_falls_when_it_is_worse_by_more_than_the_noise(
    median: float, spread: float, reaches: bool, fell: bool
) -> None:
    verdict = judged(median, spread)[0]
    assert (verdict.reaches, verdict.fell) == (reaches, fell)


@pytest.mark.parametrize(
    ("wait", "reaches", "fell"), [(0.0, True, False), (0.0099, True, False), (0.02, False, True)]
)
def test_what_should_be_small_falls_when_it_grows(wait: float, reaches: bool, fell: bool) -> None:
    verdict = judged(1.2, wait=wait)[1]
    assert (verdict.reaches, verdict.fell) == (reaches, fell)


def test_a_number_that_is_gone_is_missed() -> None:
    with pytest.raises(KeyError, match="ours_over_theirs"):
        bench.judge(BAR, {"train": {}})


def test_the_table_replaces_the_one_before_and_leaves_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"# Benchmarks\n\n{bench.START}\nold\n{bench.END}\n\n## Loader\n")
    monkeypatch.setattr(bench, "PAGE", page)
    monkeypatch.setattr(bench, "PLOT", tmp_path / "plot.svg")
    bench.write_page(judged(1.05), {"train": MACHINE, "pack": MACHINE, "loader": MACHINE | {"cores": 4}})
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("# Benchmarks\n")
    assert text.endswith("\n\n## Loader\n")
    assert "| train | ours over theirs | 1.05 | 0.02 | ≥ 1.1 | **no** |" in text
    assert "train, pack: A, 2 cores, AVX2, Python 3.11.9, torch 2.13.0." in text
    assert "loader: A, 4 cores, AVX2, Python 3.11.9, torch 2.13.0." in text
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


def test_every_bar_names_a_benchmark_that_is_run() -> None:
    bars = json.loads(bench.BARS.read_text())
    assert set(bars) <= set(bench.COMMANDS)
    assert all("recorded" in bar for numbers in bars.values() for bar in numbers.values())


def test_every_benchmark_has_a_quick_form_that_is_smaller() -> None:
    assert set(bench.QUICK) == set(bench.COMMANDS)
    assert all(bench.QUICK.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "pack" else pytest.mark.long) for name in bench.COMMANDS]
)
def test_a_quick_form_is_understood(name: str, tmp_path: Path) -> None:
    words = [*bench.words_of(name, tmp_path, quick=True), "--out", str(tmp_path / "out"), "--no-such-option"]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *words], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1].endswith("unrecognized arguments: --no-such-option")


def test_a_quick_run_says_so_on_a_page_of_its_own_and_judges_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(words: list[str], check: bool) -> None:
        asked.append(words)
        numbers = MACHINE | {"small_pack_over_plain_cpu": 99.0}
        Path(words[-1]).write_text(json.dumps(numbers))

    monkeypatch.setattr(bench.subprocess, "run", run)
    before = bench.PAGE.read_text()
    (tmp_path / "pack.json").write_text("{}")  # of a whole run
    assert bench.main(["pack", "--quick", "--work", str(tmp_path)]) == 0
    assert asked == [
        [
            sys.executable,
            "-m",
            "benchmarks.pack",
            *bench.QUICK["pack"],
            "--out",
            f"{tmp_path}/quick/pack.json",
        ]
    ]
    text = (tmp_path / "quick/benchmarks.md").read_text()
    assert text.startswith("# A quick run of the benchmarks\n\n**This is a quick run.**")
    assert "| pack | small pack over plain cpu | 99 | 0 | ≤ 1.1 | **no** |" in text
    assert bench.PAGE.read_text() == before
    assert (tmp_path / "pack.json").read_text() == "{}"
