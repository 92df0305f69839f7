"""What is measured is held against what was asked and against what was recorded."""

import json
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
