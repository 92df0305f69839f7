"""What can go wrong, each as a function that makes it happen to a job under way."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.infra.local.processes import kill
from ddpm_pipeline.infra.local.stack_state import read_state
from tests.chaos.works import Work
from tests.driving import ray_workers
from tests.ray_nodes import Node, add_node, give_notice, remove_node
from tests.relay import Mode, Relay

FREEZE_SECONDS = 20.0
TROUBLE_SECONDS = 8.0
HOUR_SECONDS = 3600.0
NOTICE_SECONDS = 15


@dataclass
class Scene:
    """Where a round takes place."""

    stack: LocalStack
    relay: Relay
    """Between the job and S3."""
    clock: Path
    """By how many seconds the driver's clock is wrong."""
    disk: Path | None
    """A small file system for the cache; None where this user may not mount one."""
    nodes: list[Node]
    """Ray nodes beside the head."""


Strike = Callable[[Scene, Work, random.Random], None]


def kill_worker(scene: Scene, work: Work, chance: random.Random) -> None:
    """SIGKILL to a process that trains or samples."""
    _signal_one(ray_workers(scene.stack, work.actor), signal.SIGKILL, chance)


def kill_driver(scene: Scene, work: Work, chance: random.Random) -> None:
    """SIGKILL to the job's own process."""
    if work.driver.process.poll() is None:
        work.driver.end(signal.SIGKILL)


def ask_driver_to_end(scene: Scene, work: Work, chance: random.Random) -> None:
    """SIGTERM to the job's own process, as a preempted machine gets."""
    if work.driver.process.poll() is None:
        work.driver.end(signal.SIGTERM)


def kill_node(scene: Scene, work: Work, chance: random.Random) -> None:
    """A raylet and everything on its node at once; a new node joins."""
    lost = scene.nodes.pop(chance.randrange(len(scene.nodes)))
    remove_node(scene.stack, lost, suddenly=True)
    scene.nodes.append(add_node(scene.stack, 1))


def drain_node(scene: Scene, work: Work, chance: random.Random) -> None:
    """Notice to a node, as a spot machine gets, 15 s before it is lost; a new node joins."""
    leaving = scene.nodes.pop(chance.randrange(len(scene.nodes)))
    give_notice(scene.stack, leaving, NOTICE_SECONDS)
    time.sleep(NOTICE_SECONDS)
    remove_node(scene.stack, leaving, suddenly=True)
    scene.nodes.append(add_node(scene.stack, 1))


def kill_head(scene: Scene, work: Work, chance: random.Random) -> None:
    """The head with its control store; a new, empty cluster takes its place."""
    _kill_service(scene.stack, "ray")
    for node in scene.nodes:
        remove_node(scene.stack, node, suddenly=True)
    scene.stack.up()
    scene.nodes = [add_node(scene.stack, 1) for _ in scene.nodes]


def kill_gateway(scene: Scene, work: Work, chance: random.Random) -> None:
    """The S3 server, started again at once."""
    _kill_service(scene.stack, "s3")
    scene.stack.up()


def kill_mlflow(scene: Scene, work: Work, chance: random.Random) -> None:
    """The MLflow server, started again at once."""
    _kill_service(scene.stack, "mlflow")
    scene.stack.up()


def freeze_worker(scene: Scene, work: Work, chance: random.Random) -> None:
    """SIGSTOP to a worker for 20 s."""
    _freeze(ray_workers(scene.stack, work.actor)[-1:])


def freeze_driver(scene: Scene, work: Work, chance: random.Random) -> None:
    """SIGSTOP to the driver for 20 s."""
    _freeze([psutil.Process(work.driver.process.pid)] if work.driver.process.poll() is None else [])


def freeze_gateway(scene: Scene, work: Work, chance: random.Random) -> None:
    """SIGSTOP to the S3 server for 20 s."""
    _freeze(_family(scene.stack, "s3"))


def freeze_mlflow(scene: Scene, work: Work, chance: random.Random) -> None:
    """SIGSTOP to MLflow for 20 s."""
    _freeze(_family(scene.stack, "mlflow"))


def slow_network(scene: Scene, work: Work, chance: random.Random) -> None:
    """Every piece of an answer of S3 comes 0.2 s late."""
    _trouble(scene, "delay")


def cut_network(scene: Scene, work: Work, chance: random.Random) -> None:
    """Answers of S3 end after some random bytes."""
    _trouble(scene, "cut")


def busy_store(scene: Scene, work: Work, chance: random.Random) -> None:
    """S3 answers 503 SlowDown to everything."""
    _trouble(scene, "busy")


def lying_network(scene: Scene, work: Work, chance: random.Random) -> None:
    """A bit of some answers of S3 is flipped."""
    _trouble(scene, "corrupt")


def full_disk(scene: Scene, work: Work, chance: random.Random) -> None:
    """The cache's disk is full, and what was cached is gone."""
    assert scene.disk is not None
    filler = scene.disk / "filler"
    for shard in scene.disk.glob("*.shard"):
        shard.unlink(missing_ok=True)
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(65536)):
            pass
    time.sleep(TROUBLE_SECONDS)
    filler.unlink()


def jumping_clock(scene: Scene, work: Work, chance: random.Random) -> None:
    """The driver's clock jumps an hour ahead or back, and stays there for the round."""
    scene.clock.write_text(str(chance.choice((-HOUR_SECONDS, HOUR_SECONDS))))


def start_second_driver(scene: Scene, work: Work, chance: random.Random) -> None:
    """The same command once more, while the first is running."""
    work.driver.start_another()


@dataclass(frozen=True)
class Fault:
    """A named strike and the jobs it can hit."""

    strike: Strike
    kinds: frozenset[str]
    needs_disk: bool = False

    @property
    def name(self) -> str:
        return self.strike.__name__.replace("_", " ")


ON_RAY = frozenset({"training", "distillation", "generation", "submission", "night"})
"""Jobs with Ray workers."""
TRACKED = ON_RAY | {"promotion", "rollback", "cleanup"}
"""Jobs that MLflow has a part in."""
STORED = TRACKED - {"rollback", "cleanup"} | {"packing"}
"""Jobs that read or write objects."""
ALL = TRACKED | STORED

FAULTS = (
    Fault(kill_worker, ON_RAY),
    Fault(kill_driver, ALL),
    Fault(ask_driver_to_end, ALL),
    Fault(start_second_driver, ALL),
    Fault(kill_node, ON_RAY),
    Fault(drain_node, ON_RAY),
    Fault(kill_head, ON_RAY),
    Fault(kill_gateway, STORED),
    Fault(kill_mlflow, TRACKED),
    Fault(freeze_worker, ON_RAY),
    Fault(freeze_driver, ALL),
    Fault(freeze_gateway, STORED),
    Fault(freeze_mlflow, TRACKED),
    Fault(slow_network, STORED),
    Fault(cut_network, STORED),
    Fault(busy_store, STORED),
    Fault(lying_network, STORED),
    Fault(full_disk, frozenset({"training", "distillation"}), needs_disk=True),
    Fault(jumping_clock, ALL - {"night"}),  # a night is named by a date
)


def _signal_one(processes: list[psutil.Process], number: int, chance: random.Random) -> None:
    if processes:
        with suppress(psutil.NoSuchProcess):
            chance.choice(processes).send_signal(number)


def _kill_service(stack: LocalStack, name: str) -> None:
    state = read_state(stack.root)
    assert state is not None
    kill(state.services[name].identity)


def _family(stack: LocalStack, name: str) -> list[psutil.Process]:
    state = read_state(stack.root)
    assert state is not None
    leader = psutil.Process(state.services[name].identity.pid)
    return [leader, *leader.children(recursive=True)]


def _freeze(processes: list[psutil.Process]) -> None:
    """Stopped, and going on after a while, whatever happens to this thread."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    wake = threading.Timer(FREEZE_SECONDS, _wake, [processes])
    wake.start()
    wake.join()


def _wake(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            os.kill(process.pid, signal.SIGCONT)


def _trouble(scene: Scene, mode: Mode) -> None:
    scene.relay.switch(mode)
    time.sleep(TROUBLE_SECONDS)
    scene.relay.switch("open")
