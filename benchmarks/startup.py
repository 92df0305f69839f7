"""What a job costs beside its work: `python -m benchmarks.startup [--out FILE]`.

A training of a few steps and a generation of a few images, of the digits, on a local stack of its own that has run the
same jobs once before. CPU seconds are summed by process over all of the stack and the command: neighbours on the
machine count little in them.

- train_cpu_seconds, train_wall_seconds: `ddpm train` of 20 steps, with evaluation, sample grid and registration
- generate_cpu_seconds, generate_wall_seconds: `ddpm generate` of 100 images in four shards
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.common import add_output_options, machine, publish
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.infra.local.stack_state import read_state
from ddpm_pipeline.jobs.runner import PROGRAM

JOBS = {
    "train": (
        *("train", "digits", "name={name}", "steps=20", "log_every_steps=20", "optimizer.warmup_steps=1"),
        *("checkpoint.every_steps=20", "grid.every_steps=20"),
    ),
    "generate": (
        *("generate", "digits", "model=train-1@champion", "output={root}/samples/{name}", "count=100"),
        *("shard_size=25", "batch_size=25"),
    ),
}
POLL_SECONDS = 0.25
Process = tuple[int, float]
"""Number and time of creation, which no other process shares."""


def main() -> None:
    """Run each job, the last time for the record, and publish what it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--runs", type=int, default=2, help="of each job; the last one is measured")
    add_output_options(parser)
    told = parser.parse_args()
    results: dict[str, object] = {**machine()}
    with tempfile.TemporaryDirectory(prefix="ddpm-startup-") as folder, stack_in(Path(folder)):
        run(folder, "pack", "digits")
        for job, words in JOBS.items():
            for number in range(1, told.runs + 1):
                name = f"{job}-{number}"
                wall, by_name = run(folder, *(w.replace("{name}", name) for w in words))
            results |= {f"{job}_wall_seconds": wall, f"{job}_cpu_seconds": sum(by_name.values())}
            print(f"{job}: {wall:.1f} s, {sum(by_name.values()):.1f} CPU seconds")
            for process, seconds in sorted(by_name.items(), key=lambda item: -item[1]):
                if seconds >= 0.3:
                    print(f"  {seconds:6.1f}  {process}")
            results[f"{job}_processes"] = by_name
    publish(results, told)


@contextmanager
def stack_in(folder: Path) -> Iterator[None]:
    """A local stack with plain files for a store, whose state lies where commands in `folder` find it."""
    stack = LocalStack(folder / ".local", "file", 4)
    stack.up()
    try:
        yield
    finally:
        stack.down()


def run(folder: str, *words: str) -> tuple[float, dict[str, float]]:
    """Wall seconds of a command that must succeed, and CPU seconds meanwhile by the names of processes."""
    state = read_state(Path(folder) / ".local")
    assert state is not None
    servers = [service.identity.pid for service in state.services.values()]
    began, before = time.monotonic(), dict(cpu_seconds(servers))
    last = dict(before)
    with tempfile.TemporaryFile() as said:
        command = subprocess.Popen([sys.executable, *PROGRAM, *words], cwd=folder, stdout=said, stderr=said)
        while command.poll() is None:
            last.update(cpu_seconds([*servers, command.pid]))
            time.sleep(POLL_SECONDS)
        wall = time.monotonic() - began
        said.seek(0)
        assert command.returncode == 0, said.read().decode()
    by_name: dict[str, float] = defaultdict(float)
    for process, (name, seconds) in last.items():
        by_name[name] += seconds - before.get(process, (name, 0.0))[1]
    return wall, dict(by_name)


def cpu_seconds(roots: list[int]) -> Iterator[tuple[Process, tuple[str, float]]]:
    """Name and CPU seconds of these processes and all below them."""
    for root in roots:
        try:
            found = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for process in found:
            try:
                times = process.cpu_times()
                yield (
                    (process.pid, process.create_time()),
                    (named(process.cmdline()), times.user + times.system),
                )
            except psutil.Error:
                continue


def named(words: list[str]) -> str:
    """A process in a word or two: Ray's actors name themselves, Python programs are known by their module."""
    line = " ".join(words).strip()
    if line.startswith("ray::"):
        return line.split()[0].partition(".")[0].partition("(")[0]
    module = re.search(r" -m ([\w.]+)( \w+)?", line)
    if module is not None:
        return module.group(0).removeprefix(" -m ").removeprefix("ddpm_pipeline.jobs.cli ")
    return Path(words[0]).name if words else "?"


if __name__ == "__main__":
    main()
