"""What the benchmarks do alike: contenders take turns in one process, and what is published is the median of their
paired ratios with its spread, beside the machine and the versions it was measured on."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch


class Seconds(NamedTuple):
    """What one turn took."""

    cpu: float
    """Of this process with all its threads: neighbours on the machine count little in it."""
    wall: float


class Ratio(NamedTuple):
    """Paired ratios: half of them lie between `low` and `high`."""

    median: float
    low: float
    high: float
    pairs: int


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Turn by turn, so that a slow spell of the machine meets both sides. ValueError without two equal, full sides."""
    pairs = [above / below for above, below in zip(numerators, denominators, strict=True)]
    if not pairs:
        raise ValueError("numerators is empty")
    low, _, high = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
    return Ratio(statistics.median(pairs), low, high, len(pairs))


def take_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up_rounds: int = 1
) -> dict[str, list[Seconds]]:
    """Each contender once a round; the rounds that warm up are not counted."""
    taken: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for number in range(warm_up_rounds + rounds):
        for name, work in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if number >= warm_up_rounds:
                taken[name].append(Seconds(time.process_time() - cpu, time.perf_counter() - wall))
    return taken


def compare(taken: Mapping[str, Sequence[Seconds]], slow: str, fast: str) -> dict[str, Ratio]:
    """How many times faster `fast` is than `slow`, by CPU time and by wall time."""
    return {
        f"{fast}_over_{slow}_{kind}": ratio_of(
            [getattr(s, kind) for s in taken[slow]], [getattr(s, kind) for s in taken[fast]]
        )
        for kind in Seconds._fields
    }


def machine(*packages: str) -> dict[str, str | int]:
    """Where figures come from: processor, cores, threads in use, versions."""
    found = {f"version_{name}": metadata.version(name) for name in ("torch", *packages)}
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **found,
    }


def put_between(page: Path, start: str, end: str, text: str) -> None:
    """Replace what stands in a page between two marks. ValueError where a mark is missing."""
    head, first, rest = page.read_text().partition(start)
    _, second, tail = rest.partition(end)
    if not (first and second):
        raise ValueError(f"{page}: the marks {start!r} and {end!r} are expected in this order")
    page.write_text(f"{head}{start}\n{text}\n{end}{tail}")


def plain_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.NAME`, without options; `description` is shown as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser_of(name: str, description: str | None, parts: Sequence[str]) -> argparse.ArgumentParser:
    """The same, which measures `parts` beside peers: --parts and --peers."""
    parser = plain_parser(name, description)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--peers", type=Path, help="folder made by: python -m benchmarks.trainers FOLDER")
    return parser


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """--json and --out, the same for every benchmark."""
    parser.add_argument("--json", action="store_true", help="print one JSON object of named numbers")
    parser.add_argument("--out", type=Path, help="file for the same JSON object")


def publish(numbers: Mapping[str, object], told: argparse.Namespace) -> None:
    """Print the numbers as lines or as JSON, and write them where told to."""
    text = json.dumps({name: _plain(value) for name, value in numbers.items()}, indent=2)
    if told.out is not None:
        told.out.write_text(text + "\n")
    if told.json:
        print(text)
        return
    for name, value in numbers.items():
        print(f"{name:44s} {_shown(value)}")


def _plain(value: object) -> object:
    if isinstance(value, Ratio):
        return {
            name: round(part, 4) if isinstance(part, float) else part
            for name, part in value._asdict().items()
        }
    return round(value, 5) if isinstance(value, float) else value


def _shown(value: object) -> str:
    if isinstance(value, Ratio):
        return f"{value.median:.3f}  (half within {value.low:.3f} to {value.high:.3f}, {value.pairs} pairs)"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
