"""All benchmarks in one go: `python -m benchmarks [NAME ...]`; `make bench` runs them all.

Each runs as a process of its own and leaves its numbers in .local/bench/NAME.json; a number that is there is not
measured again until --again. Their bars (what was asked, and what was last recorded here) stand in bars.json. The
table and the plot of docs/benchmarks.md are written from both. Exit code 1 when a number has fallen behind what was
recorded by more than its spread.

`--quick` runs the same benchmarks smaller, in minutes: it shows that they work and roughly what they give. Its numbers
lie in .local/bench/quick, its page is .local/bench/quick/benchmarks.md, and nothing is judged by them.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import put_between
from ddpm_pipeline.errors import UserError

HERE = Path(__file__).parent
BARS = HERE / "bars.json"
PAGE = HERE.parent / "docs/benchmarks.md"
PLOT = HERE.parent / "docs/images/benchmarks.svg"
COMMANDS: dict[str, list[str]] = {
    "loader": ["--peers", "{work}/peers"],
    "pack": [],
    "train": ["--peers", "{work}/trainers"],
    "generate": [],
    "few_steps": [],
    "listings": [],
    "scale": [],
    "startup": [],
    "quality": [
        *("--peers", "{work}/trainers", "--work", "{work}/quality", "--minutes", "60"),
        *("--recipes", "ours", "diffusers", "denoising_diffusion"),
    ],
}
"""What each is called with; {work} is where peers and half-done work are kept."""
QUICK: dict[str, list[str]] = {
    "loader": ["--rates-only", "--samples", "1500", "--photographs", "128", "--starts", "1"],
    "pack": ["--pictures", "400", "--rounds", "2"],
    "train": ["--rounds", "3", "--windows", "4"],
    "generate": ["--steps", "4", "--rounds", "2"],
    "few_steps": ["--rounds", "1"],
    "listings": ["--shards", "20000"],
    "scale": ["--shards", "10", "20"],
    "startup": ["--runs", "1"],
    "quality": ["--steps", "120", "--seeds", "1", "--recipes", "ours", "diffusers"],
}
"""What is added to `COMMANDS` for a quick run; a later option overrides an earlier one."""
QUICK_PAGE = """# A quick run of the benchmarks

**This is a quick run.** It is smaller than `make bench` in every respect (fewer images, shards, steps and rounds), so
its numbers are rough, and differ from those in docs/benchmarks.md. Nothing is judged by them.

"""
START, END = "<!-- table: written by `make bench` -->", "<!-- end of table -->"


class Verdict(NamedTuple):
    """One number beside its bar."""

    benchmark: str
    name: str
    value: float
    spread: float
    """Half the distance between the quartiles of its paired ratios; 0 for a number without repeats."""
    asked: float | None
    recorded: float
    at_least: bool
    """Whether more is better."""
    slack: float
    """How much worse than recorded is noise, where the number has no spread of its own."""

    @property
    def fell(self) -> bool:
        """Worse than what was recorded by more than the noise, and by more than a twentieth."""
        slack = max(self.spread, self.slack, 0.05 * abs(self.recorded))
        worse_by = self.recorded - self.value if self.at_least else self.value - self.recorded
        return worse_by > slack

    @property
    def reaches(self) -> bool:
        """Whether it is what was asked for."""
        return self.asked is None or (self.value >= self.asked if self.at_least else self.value <= self.asked)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, write the page, judge."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(COMMANDS), help=f"of {', '.join(COMMANDS)}")
    parser.add_argument("--work", type=Path, default=Path(".local/bench"))
    parser.add_argument("--again", action="store_true", help="measure what has been measured before, too")
    parser.add_argument("--quick", action="store_true", help="smaller, always anew, and not judged")
    told = parser.parse_args(argv)
    kept = told.work / "quick" if told.quick else told.work
    kept.mkdir(parents=True, exist_ok=True)
    for name in told.names:
        if name not in COMMANDS:
            raise UserError(f"{name}: no such benchmark; there are {', '.join(COMMANDS)}")
        _run(name, told.work, told.again, told.quick)
    found = measured(kept)
    if told.quick:
        return _write_quick_page(kept / "benchmarks.md", found)
    verdicts = judge(json.loads(BARS.read_text()), found)
    write_page(verdicts, found)
    fallen = [verdict for verdict in verdicts if verdict.fell]
    for verdict in fallen:
        print(
            f"fell: {verdict.benchmark} {verdict.name} is {verdict.value:.3g}, recorded {verdict.recorded:.3g}"
        )
    print(f"{len(verdicts)} numbers with a bar, {len(fallen)} fallen; see {PAGE.relative_to(HERE.parent)}")
    return 1 if fallen else 0


def _run(name: str, work: Path, again: bool, quick: bool) -> None:
    out = place(name, work, quick)
    if out.exists() and not (again or quick):
        print(f"{name}: measured before ({out}); --again measures anew", flush=True)
        return
    words = words_of(name, work, quick)
    trainers = work / "trainers"
    if str(trainers) in words and not trainers.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.trainers", str(trainers)], check=True)
    print(f"{name}: python -m benchmarks.{name} {' '.join(words)}", flush=True)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *words, "--out", str(out)], check=True)
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def words_of(name: str, work: Path, quick: bool = False) -> list[str]:
    """The arguments of a benchmark. Peers are shared by quick and whole runs, half-done work is not."""
    words = [
        word.replace("{work}/quality", "{work}/quick/quality") if quick else word for word in COMMANDS[name]
    ]
    return [word.replace("{work}", str(work)) for word in words] + (QUICK[name] if quick else [])


def place(name: str, work: Path, quick: bool) -> Path:
    """The file of a benchmark's numbers."""
    return (work / "quick" if quick else work) / f"{name}.json"


def _write_quick_page(page: Path, found: Mapping[str, Mapping[str, Any]]) -> int:
    """The numbers that have a bar, beside it, under a sentence that says what they are."""
    bars = json.loads(BARS.read_text())
    known = {
        benchmark: {name: bar for name, bar in numbers.items() if name in found.get(benchmark, {})}
        for benchmark, numbers in bars.items()
    }
    page.write_text(QUICK_PAGE + "\n".join([*table(judge(known, found)), "", *machines(found)]) + "\n")
    print(f"quick run of {', '.join(found)}; see {page}")
    return 0


def measured(work: Path) -> dict[str, dict[str, Any]]:
    """The numbers of all benchmarks that have been run."""
    return {
        name: json.loads(file.read_text()) for name in COMMANDS if (file := work / f"{name}.json").exists()
    }


def judge(bars: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """Every number that has a bar. KeyError when a benchmark that ran no longer has that number."""
    verdicts: list[Verdict] = []
    for benchmark, numbers in found.items():
        for name, bar in bars.get(benchmark, {}).items():
            number = numbers[name]
            ratio = isinstance(number, dict)
            value = float(number["median"] if ratio else number)
            spread = (number["high"] - number["low"]) / 2 if ratio else 0.0
            asked = bar.get("asked")
            verdicts.append(
                Verdict(
                    benchmark,
                    name,
                    value,
                    spread,
                    asked,
                    bar["recorded"],
                    bar.get("at_least", True),
                    bar.get("slack", 0.0),
                )
            )
    return verdicts


def write_page(verdicts: Sequence[Verdict], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the table and the machines between their marks, and the plot beside them."""
    put_between(PAGE, START, END, "\n".join([*table(verdicts), "", *machines(found)]))
    draw(verdicts)


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """Every number beside its bar, a line each."""
    lines = ["| benchmark | number | measured | half spread | asked | reached |", "|" + " --- |" * 6]
    for v in verdicts:
        sign = "≥" if v.at_least else "≤"
        asked = "" if v.asked is None else f"{sign} {v.asked:g}"
        reached = "" if v.asked is None else ("yes" if v.reaches else "**no**")
        name = v.name.replace("_", " ")
        lines.append(f"| {v.benchmark} | {name} | {v.value:.3g} | {v.spread:.2g} | {asked} | {reached} |")
    return lines


def machines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which benchmarks were measured on which machine, a line each."""
    names: dict[str, list[str]] = {}
    for benchmark, numbers in found.items():
        facts = "{processor}, {cores} cores, {vectors}, Python {python}, torch {version_torch}"
        names.setdefault(facts.format_map(numbers), []).append(benchmark)
    return [f"{', '.join(benchmarks)}: {facts}." for facts, benchmarks in names.items()]


def draw(verdicts: Sequence[Verdict]) -> None:
    """What was measured over what was asked (under it, where less is better), a bar a number; over the line is good."""
    from matplotlib.figure import Figure

    shown = [v for v in verdicts if v.asked and v.value > 0]
    if not shown:
        return
    shares = [v.value / v.asked if v.at_least else v.asked / v.value for v in shown if v.asked]
    figure = Figure(figsize=(8, 0.35 * len(shown) + 1), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(
        [f"{v.benchmark}: {v.name.replace('_', ' ')}" for v in shown],
        shares,
        color=["#3a7" if s >= 1 else "#c63" for s in shares],
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times better than asked")
    axes.margins(y=0.01)
    axes.set_xlim(0, min(max(shares) * 1.05, 4))
    axes.invert_yaxis()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
