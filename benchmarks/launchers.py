"""The same two-worker training under Ray Train and under torchrun, both alive at once, a window of steps each in turn.

Rank 0 of each takes the time from its turn's beginning to its window's end, of its process with all threads; what
Ray's own daemons use meanwhile is counted beside it. The other group waits without working.
"""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch

from benchmarks.common import ratio_of
from benchmarks.trainers import pack_images
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.train import ray_trainer
from ddpm_pipeline.train.session import Driver
from ddpm_pipeline.train.worker import TrainTask, WorkerContext, train_worker

NAMES = ("torchrun", "ray")
WINDOW_STEPS, WINDOWS = 10, 24
WARM_UP_WINDOWS = 2
PATIENCE_SECONDS = 240.0


@dataclass(frozen=True)
class Relay:
    """Whose turn it is: a file in a folder that both groups see."""

    folder: Path
    name: str

    def arrive(self) -> None:
        """Say that this group is ready. Once all are, the first one gives itself the first turn; the others do not,
        as they could give it again when it is over.
        """
        (self.folder / f"{self.name}.ready").touch()
        if self.name == NAMES[0]:
            self._until(lambda: all((self.folder / f"{name}.ready").exists() for name in NAMES))
            self._give(self.name)

    def wait(self) -> None:
        """Until it is this group's turn. Raises TimeoutError if that never comes."""
        turn = self.folder / "turn"
        self._until(lambda: turn.exists() and turn.read_text() == self.name)

    def _until(self, is_met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_met():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: the other group did not come")
            time.sleep(0.005)

    def pass_on(self) -> None:
        """To the other group."""
        self._give(next(name for name in NAMES if name != self.name))

    def _give(self, name: str) -> None:
        part = self.folder / f"turn.{self.name}"
        part.write_text(name)
        part.rename(self.folder / "turn")


class Timed:
    """A driver as rank 0 sees it that also takes the time of every window, and waits between them."""

    def __init__(self, relay: Relay, inner: Driver | None, last_step: int) -> None:
        self._relay, self._inner, self._last_step = relay, inner, last_step
        self._out = relay.folder / f"{relay.name}.jsonl"
        self._began: tuple[float, float, float] | None = None

    def report(self, step: int, note: str) -> None:
        """The end of a window."""
        if self._inner is not None:
            self._inner.report(step, note)
        if self._began is None:
            self._relay.arrive()
        else:
            cpu, wall, daemons = (now - then for now, then in zip(_clocks(), self._began, strict=True))
            with self._out.open("a") as out:
                out.write(json.dumps({"step": step, "cpu": cpu, "wall": wall, "daemons": daemons}) + "\n")
            self._relay.pass_on()
        if step < self._last_step:
            self._relay.wait()
        self._began = _clocks()

    def should_stop(self) -> bool:
        """Whatever the real driver says."""
        return self._inner is not None and self._inner.should_stop()


def measure_launchers(scratch: Path, windows: int = WINDOWS) -> dict[str, object]:
    """CPU and wall time a step under Ray Train over that under torchrun, in so many windows of which two warm up."""
    relay = scratch / "relay"
    relay.mkdir()
    images = torch.randint(0, 256, (512, 1, 16, 16), dtype=torch.uint8)
    task = _task(pack_images(scratch / "launched", images), (scratch / "run").as_uri(), windows)
    with _torchrun(task, relay):
        _on_ray(task, relay)
    taken = {name: _windows(relay, name) for name in NAMES}
    found: dict[str, object] = {
        f"ray_over_torchrun_{kind}": ratio_of(*([w[kind] for w in taken[n]] for n in ("ray", "torchrun")))
        for kind in ("cpu", "wall")
    }
    own = sum(window["cpu"] for window in taken["ray"])
    daemons = sum(window["daemons"] for window in taken["ray"])
    found["ray_daemons_cpu_over_two_workers"] = daemons / (2 * own)
    found["torchrun_step_cpu_seconds"] = sum(w["cpu"] for w in taken["torchrun"]) / (
        WINDOW_STEPS * len(taken["torchrun"])
    )
    return found


def _task(uri: str, run_uri: str, windows: int) -> TrainTask:
    plain: dict[str, Any] = {
        "name": "launched",
        "data": {"uri": uri},
        "net": {
            "image_size": 16, "in_channels": 1, "out_channels": 1, "base_channels": 32, "multipliers": (1, 2),
            "attention_resolutions": (8,),
        },
        "steps": WINDOW_STEPS * windows,
        "global_batch": 32,
        "log_every_steps": WINDOW_STEPS,
        "checkpoint": {"every_steps": WINDOW_STEPS * 10**6},
        "grid": {"every_steps": 10**7, "count": 1, "sampler": {"kind": "ddim", "num_steps": 1}},
        "workers": {"num_workers": 2},
    }  # fmt: skip
    return TrainTask(TrainConfig.model_validate(plain), "bench", run_uri, load_index(uri).digest)


def _windows(relay: Path, name: str) -> list[dict[str, float]]:
    lines = (relay / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[WARM_UP_WINDOWS:]]


def _clocks() -> tuple[float, float, float]:
    return time.process_time(), time.perf_counter(), _daemons_cpu_seconds()


def _daemons_cpu_seconds() -> float:
    """CPU time of Ray's daemons, if this process is a worker of theirs: its parent and the parent's siblings."""
    raylet = psutil.Process().parent()
    if raylet is None or "raylet" not in raylet.name():
        return 0.0
    family = [raylet, *(child for child in raylet.parent().children() if child.pid != raylet.pid)]
    times = [each.cpu_times() for each in family]
    return sum(each.user + each.system for each in times)


def _on_ray(task: TrainTask, relay: Path) -> None:
    """The job's own way of training on a cluster, with a timed driver on rank 0."""
    import ray

    def body(payload: dict[str, Any]) -> None:
        _timed_worker(payload, relay)

    task = replace(task, run_uri=task.run_uri + "-ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        with mock.patch.object(ray_trainer, "_on_worker", body):
            ray_trainer.train_on_cluster(task, lambda done, total, text: None, threading.Event())
    finally:
        ray.shutdown()


def _timed_worker(payload: dict[str, Any], relay: Path) -> None:
    """In a worker of Ray's: the driver of the job, timed."""
    real, last_step = ray_trainer._RemoteDriver, payload["task"].config.steps

    def timed(coordinator: Any) -> Timed:
        return Timed(Relay(relay, "ray"), real(coordinator), last_step)

    with mock.patch.object(ray_trainer, "_RemoteDriver", timed):
        ray_trainer._on_worker(payload)


@contextmanager
def _torchrun(task: TrainTask, relay: Path) -> Generator[None]:
    """The same training by torchrun, alongside. Raises CalledProcessError if it fails."""
    order = relay / "order.json"
    order.write_text(
        json.dumps(
            {
                "config": task.config.model_dump(mode="json"),
                "run": task.run_uri + "-torchrun",
                "data": task.data_digest,
            }
        )
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", str(port), "-m", "benchmarks.launchers", str(order),
    ]  # fmt: skip
    group = subprocess.Popen(command)
    try:
        yield
        if group.wait(timeout=PATIENCE_SECONDS):
            raise subprocess.CalledProcessError(group.returncode, command)
    finally:
        group.terminate()
        group.wait()


def _torchrun_worker(order: Path) -> None:
    told: dict[str, Any] = json.loads(order.read_text())
    config = TrainConfig.model_validate(told["config"])
    torch.set_num_threads(config.workers.cpus_per_worker)
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    driver = Timed(Relay(order.parent, "torchrun"), None, config.steps) if rank == 0 else None
    place = WorkerContext(rank, world, torch.device("cpu"))
    train_worker(TrainTask(config, "bench", told["run"], told["data"]), place, driver)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _torchrun_worker(Path(sys.argv[1]))
