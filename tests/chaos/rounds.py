"""A round: a job, faults drawn by (seed, round), the same command until it is done, and a comparison."""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.infra.local import LocalStack
from tests.chaos.faults import FAULTS, Fault, Scene
from tests.chaos.operations import OPERATIONS, Shared
from tests.chaos.works import Fingerprint, Generation, Work, differences, distillation, training
from tests.driving import ray_workers
from tests.generate.tiny import tiny_model
from tests.ray_nodes import add_node, remove_node
from tests.relay import Relay

KINDS = ("training", "distillation", "generation", *OPERATIONS)
MOST_STARTS = 12
PATIENCE_SECONDS = 240.0
"""Without progress for this long, a job counts as hung."""
DISK_BYTES = 16_000_000
CLOCK_FOLDER = Path(__file__).parent / "clock"


@dataclass(frozen=True)
class Outcome:
    """What a round did and found."""

    seed: int
    number: int
    kind: str
    faults: tuple[str, ...]
    """Each with the share of the work after which it struck."""
    starts: int
    seconds: float
    lost: tuple[str, ...]
    """What differs from the undisturbed run; empty = nothing was lost."""
    missed: tuple[str, ...] = ()
    """Faults that were drawn and did not strike, each with the reason."""


class Arena:
    """A stack to attack, and the undisturbed results to compare with (made when first needed)."""

    def __init__(self, stack: LocalStack, folder: Path) -> None:
        self.folder = folder
        self.place = f"s3://ddpm/chaos/{folder.name}"
        self._stack = stack
        self._undisturbed: dict[str, Fingerprint] = {}
        pack(PackConfig(source="digits", dest=f"{self.place}/data", channels=1, shard_size=300), None)
        tiny_model(folder / "model")
        self._shared = Shared(self.place, folder)

    def play(self, seed: int, number: int, kinds: Sequence[str] = KINDS) -> Outcome:
        """One round of one of `kinds`. Nothing in it depends on the rounds before."""
        chance = random.Random(f"{seed}/{number}")
        kind = chance.choice(kinds)
        with _scene(self._stack, self.folder, f"{seed}/{number}") as scene:
            possible = [f for f in FAULTS if kind in f.kinds]
            faults = [chance.choice(possible) for _ in range(chance.randint(1, 3))]
            goals = sorted(chance.uniform(0.02, 0.8) for _ in faults)
            plan = list(zip(goals, faults, strict=True))
            return self._attack(kind, scene, plan, seed, number, chance)

    def _attack(
        self,
        kind: str,
        scene: Scene,
        plan: list[tuple[float, Fault]],
        seed: int,
        number: int,
        chance: random.Random,
    ) -> Outcome:
        expected = self._expected(kind)
        began = time.monotonic()
        work = self._work(kind, f"{kind}-{seed}-{number}", scene.disk)
        work.start(_variables(scene))
        struck: list[str] = []
        missed: list[str] = []
        lost: list[str] = []
        try:
            for goal, fault in plan:
                _until(work, goal)
                if work.driver.process.poll() == 0:
                    missed.append(f"{fault.name}: the job had ended")
                elif fault.needs_disk and scene.disk is None:
                    missed.append(f"{fault.name}: no file system may be mounted here")
                else:
                    fault.strike(scene, work, chance)
                    struck.append(f"{fault.name} at {goal:.0%}")
            _until(work, float("inf"))
            _join_others(work)
            lost = differences(expected, work.fingerprint())
        except HungError as error:
            found = stacks(self._stack, work, self.folder / f"hung-{kind}-{seed}-{number}.txt")
            lost = [f"{error}; where its processes stood: {found}"]
        finally:
            for process in (work.driver.process, *work.driver.others):
                with suppress(ProcessLookupError):
                    process.kill()
        seconds = time.monotonic() - began
        return Outcome(
            seed=seed,
            number=number,
            kind=kind,
            faults=tuple(struck),
            starts=work.driver.starts,
            seconds=round(seconds, 1),
            lost=tuple(lost),
            missed=tuple(missed),
        )

    def _expected(self, kind: str) -> Fingerprint:
        if kind not in self._undisturbed:
            work = self._work(kind, f"{kind}-calm", None)
            work.start({})
            _until(work, float("inf"))
            self._undisturbed[kind] = work.fingerprint()
        return self._undisturbed[kind]

    def _work(self, kind: str, name: str, cache: Path | None) -> Work:
        folder, place = self.folder / name, f"{self.place}/{name}"
        if kind == "training":
            return training(self._shared.data, place, name, folder, cache)
        if kind == "distillation":
            return distillation(self._shared.data, self._shared.teacher, place, name, folder, cache)
        if kind == "generation":
            return Generation(self.folder / "model", place, name, folder)
        return OPERATIONS[kind](self._shared, place, name, folder)


def stacks(stack: LocalStack, work: Work, dest: Path) -> Path:
    """Write down where every thread of the driver and its workers stands, as py-spy sees it; returns `dest`."""
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or "py-spy"  # comes with Ray
    processes = [work.driver.process.pid, *(one.pid for one in ray_workers(stack, work.actor))]
    with dest.open("w") as out:
        for pid in processes:
            subprocess.run([spy, "dump", "--pid", str(pid)], stdout=out, stderr=out, check=False, timeout=60)
    return dest


def _join_others(work: Work) -> None:
    """Wait for processes of the same command; whatever they say of it, the result is what counts."""
    for process in work.driver.others:
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise HungError(f"a second driver does not end; last said: {work.driver.said[-300:]!r}") from None


class HungError(Exception):
    """A job that makes no progress, or does not end however often it is started."""


def _until(work: Work, goal: float) -> None:
    """Until this share is done or the job has completed; ended early, it is started again."""
    best, since = -1.0, time.monotonic()
    while work.driver.process.poll() != 0:
        work.driver.again()
        done = work.done()
        if done >= goal:
            return
        if done > best:
            best, since = done, time.monotonic()
        if time.monotonic() - since > PATIENCE_SECONDS or work.driver.starts > MOST_STARTS:
            raise HungError(
                f"no end: {best:.0%} done, {work.driver.starts} starts; last said: {work.driver.said[-300:]!r}"
            )
        time.sleep(0.2)


@contextmanager
def _scene(stack: LocalStack, folder: Path, name: str) -> Generator[Scene]:
    """Everything up and in order, a node beside the head, and a relay and a disk of the round's own."""
    stack.up()
    host, port = _endpoint(stack)
    relay = Relay(host, port, seed=hash_of(name))
    clock = folder / "clock"
    clock.write_text("0")
    node = add_node(stack, 1)
    with _small_disk(folder / "disk") as disk:
        scene = Scene(stack, relay, clock, disk, [node])
        try:
            yield scene
        finally:
            relay.close()
            for one in scene.nodes:
                remove_node(stack, one)


@contextmanager
def _small_disk(folder: Path) -> Generator[Path | None]:
    """A tmpfs of 16 MB, or None where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        # lazily: a worker that is just ending may still have a shard open
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _variables(scene: Scene) -> Mapping[str, str]:
    return {
        "AWS_ENDPOINT_URL": scene.relay.uri,
        "PYTHONPATH": str(CLOCK_FOLDER),
        "CHAOS_CLOCK": str(scene.clock),
        "DDPM_SPOOL": tempfile.mkdtemp(prefix="spool-", dir=scene.clock.parent),
    }


def _endpoint(stack: LocalStack) -> tuple[str, int]:
    row = next(row for row in stack.status() if row.service == "s3")
    host, _, port = row.url.removeprefix("http://").partition(":")
    return host, int(port)


def hash_of(name: str) -> int:
    """A number of a name, the same in every process."""
    return random.Random(name).getrandbits(32)
