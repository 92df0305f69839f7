"""Attack the pipeline: `python -m tests.chaos --seed 7 --rounds 10`, or one round again: `--seed 7 --round 3`.

Starts a stack of its own, ends with exit code 1 if anything was lost, and appends what it found to a file of JSON
lines. `--write docs/reliability.md` adds them to the rounds which that page lists.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from benchmarks.common import put_between
from ddpm_pipeline.infra.local import LocalStack, export_environment
from ddpm_pipeline.infra.local.ray import LOOPBACK_SETTINGS
from tests.driving import ended_after

if TYPE_CHECKING:
    from tests.chaos.rounds import Outcome

RECORD = Path(".local/chaos.jsonl")
HEAD_CPUS = 2
START, END = "<!-- rounds: written by `python -m tests.chaos --write` -->", "<!-- end of rounds -->"
ROUND_ROW = re.compile(r"\| \d+ \| \d+ \| ")
STRUCK = re.compile(r"([a-z ]+) at \d+%")


def main(argv: Sequence[str] | None = None) -> int:
    """Play the rounds that are asked for; 0 when nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="names the faults of every round")
    parser.add_argument("--rounds", type=int, default=10, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--round", type=int, help="only this one")
    parser.add_argument("--kind", action="append", help="only rounds of this job; may be repeated")
    parser.add_argument("--record", type=Path, default=RECORD, help="file that outcomes are appended to")
    parser.add_argument(
        "--write", type=Path, help="add all recorded outcomes to the tables of this page, play nothing"
    )
    options = parser.parse_args(argv)
    if options.write is not None:
        put_between(options.write, START, END, tables(options.record, options.write.read_text()))
        return 0
    numbers = (
        range(options.first, options.first + options.rounds) if options.round is None else [options.round]
    )
    options.record.parent.mkdir(parents=True, exist_ok=True)
    lost = 0
    with _stack() as (stack, folder):
        from tests.chaos.rounds import KINDS, Arena

        arena = Arena(stack, folder)
        for number in numbers:
            outcome = arena.play(options.seed, number, options.kind or KINDS)
            with options.record.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            print(row(outcome), flush=True)
            lost += bool(outcome.lost)
    print(f"{len(numbers)} rounds, {lost} with a loss" + (f"; logs in {folder}" if lost else ""))
    return 1 if lost else 0


@contextmanager
def _stack() -> Generator[tuple[LocalStack, Path]]:
    """A stack in a folder of its own, ended with all it started; after a loss the folder stays."""
    os.environ.update(LOOPBACK_SETTINGS)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "RAY_", "DDPM_"))}
    folder = Path(tempfile.mkdtemp(prefix="ddpm-chaos-"))
    stack = LocalStack(folder / "stack", "s3", HEAD_CPUS, environ=bare)
    signal.signal(signal.SIGTERM, _leave)
    print("starting a stack to attack", flush=True)
    with ended_after(stack):
        stack.up()
        export_environment(stack.root)
        yield stack, folder


def _leave(_number: int, _frame: FrameType | None) -> None:
    sys.exit(143)


def row(outcome: "Outcome") -> str:
    """A round on one line."""
    result = "nothing lost" if not outcome.lost else "LOST " + "; ".join(outcome.lost)[:300]
    return (
        f"seed {outcome.seed} round {outcome.number:>3}  {outcome.kind:<10}  "
        f"{', '.join((*outcome.faults, *outcome.missed))}  ->  "
        f"{outcome.starts} starts, {outcome.seconds} s, {result}"
    )


def tables(record: Path, page: str) -> str:
    """The rounds that `page` lists and those recorded since as Markdown, a count of each fault above."""
    rows = [line for line in page.splitlines() if ROUND_ROW.match(line)]
    for line in record.read_text().splitlines():
        o = json.loads(line)
        faults, lost = ", ".join(o["faults"] + o["missed"]), "; ".join(o["lost"]) or "nothing"
        rows.append(
            f"| {o['seed']} | {o['number']} | {o['kind']} | {faults} | {o['starts']} | {o['seconds']} | {lost} |"
        )
    rows = list(dict.fromkeys(rows))  # written twice, a record is listed once
    struck = Counter(name.strip() for line in rows for name in STRUCK.findall(line))
    jobs = Counter(line.split(" | ")[2] for line in rows)
    return "\n".join(
        (
            *("| job | rounds |", "| --- | --- |", *(f"| {n} | {c} |" for n, c in sorted(jobs.items())), ""),
            *(
                "| fault | times |",
                "| --- | --- |",
                *(f"| {n} | {c} |" for n, c in sorted(struck.items())),
                "",
            ),
            *("| seed | round | job | faults | starts | seconds | lost |", "|" + " --- |" * 7, *rows),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
