"""Trainings on the real stack that are killed, and lose nodes and services, end as if nothing had happened."""

import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.infra.local import LocalStack, environment
from ddpm_pipeline.infra.local.processes import kill
from ddpm_pipeline.infra.local.ray import temp_dir
from ddpm_pipeline.infra.local.stack_state import read_state
from ddpm_pipeline.telemetry.logs import FORM_VARIABLE
from ddpm_pipeline.tracking import find_run, resolve, tracking_client
from ddpm_pipeline.train.checkpoint import finished_steps, latest_checkpoint
from ddpm_pipeline.train.training_plan import TrainPlan, plan_training
from tests.chronicle import PROPERTY, Chronicle
from tests.commands import ddpm
from tests.driving import Driver, ended_after, ray_workers
from tests.effort import is_long
from tests.ray_nodes import Node, add_node, give_notice, remove_node
from tests.relay import Relay
from tests.train.group import Outcome, run_group
from tests.train.tiny import tiny

pytestmark = [pytest.mark.stack, pytest.mark.first, pytest.mark.timeout(900)]

HEALTH_CHECK_VARIABLE = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
STEPS, MARK_STEPS, GRID_STEPS = (800, 40, 240) if is_long() else (160, 20, 120)
POLL_SECONDS = 0.4  # each look is a listing of the checkpoints
OUTAGE_SECONDS = 15.0  # longer than the store's own retries, and in all less than a step's time-out


@pytest.fixture(scope="module")
def has_two_nodes(request: pytest.FixtureRequest) -> bool:
    """With --long each worker stands on a node of its own, so that a node can be lost."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="module")
def cluster(
    stack: LocalStack,
    tmp_path_factory: pytest.TempPathFactory,
    bare_environ: dict[str, str],
    has_two_nodes: bool,
) -> Iterator[LocalStack]:
    """The session's stack, or a cluster beside it whose nodes have a CPU each."""
    if not has_two_nodes:
        yield stack
        stack.up()  # a test that failed may have left it without a head
        return
    outside = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "MLFLOW_"))}
    local = LocalStack(tmp_path_factory.mktemp("cluster"), "s3", 1, environ=bare_environ | outside)
    with ended_after(local):
        local.up()
        yield local


@pytest.fixture
def node(cluster: LocalStack, has_two_nodes: bool) -> Iterator[list[Node]]:
    """The second node, where there is one; a test that loses it may put another in its place."""
    nodes = [add_node(cluster, 1)] if has_two_nodes else []
    yield nodes
    for one in nodes:
        remove_node(cluster, one)


@pytest.fixture(scope="module")
def data(stack: LocalStack) -> str:
    uri = "s3://ddpm/tests/recovery-digits"
    pack(PackConfig(source="digits", dest=uri, channels=1, shard_size=300), None)
    return uri


@dataclass
class Relays:
    """What stands between the job and its services."""

    s3: Relay
    mlflow: Relay

    def outage(self) -> None:
        """Neither service is there for a while."""
        for relay in (self.s3, self.mlflow):
            relay.switch("refuse")
        time.sleep(OUTAGE_SECONDS)
        for relay in (self.s3, self.mlflow):
            relay.switch("open")


@pytest.fixture
def relays(stack: LocalStack) -> Iterator[Relays]:
    state = read_state(stack.root)
    assert state is not None
    both = Relays(Relay("127.0.0.1", state.ports["s3"]), Relay("127.0.0.1", state.ports["mlflow"]))
    yield both
    both.s3.close()
    both.mlflow.close()


def config_of(uri: str, prefix: str, name: str, **changes: object) -> TrainConfig:
    settings: dict[str, object] = {
        "name": name,
        "steps": STEPS,
        "log_every_steps": 20,
        "checkpoint": {"every_steps": MARK_STEPS, "eval_samples": 32},
        "grid": {"every_steps": GRID_STEPS, "count": 10, "sampler": {"kind": "ddim", "num_steps": 2}},
        "workers": {"num_workers": 2},
        "track": {"experiment": f"tests-{name}", "send_interval_seconds": 0.2},
    }
    return tiny(uri, f"{prefix}/{name}", **(settings | changes))


@pytest.fixture(scope="module")
def calm(data: str, stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The undisturbed training: two workers that were joined without Ray."""
    folder = tmp_path_factory.mktemp("calm")
    outcome = run_group(config_of(data, f"file://{folder}", "calm"), 2, folder)
    assert outcome.exit_codes == [0, 0]
    return outcome


class Job(Driver):
    """`ddpm train` on the cluster of this module, through relays where they are given."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        cluster: LocalStack,
        relays: Relays | None = None,
        more: Mapping[str, str] | None = None,
    ) -> None:
        self.plan = plan_training(config)
        self._cluster = cluster
        found = environment(cluster.root).items()
        variables = {name: value for name, value in found if name.startswith("RAY_")}
        variables[HEALTH_CHECK_VARIABLE] = "0.2"
        if relays is not None:
            variables |= {"AWS_ENDPOINT_URL": relays.s3.uri, "MLFLOW_TRACKING_URI": relays.mlflow.uri}
        super().__init__("train", config, folder, variables | dict(more or {}))

    def wait_for_step(self, step: int) -> None:
        """Until a checkpoint of at least this step is there."""
        self.wait_until(lambda: self.step() >= step)

    def step(self) -> int:
        """Of the last checkpoint."""
        return max(finished_steps(self.plan.store), default=0)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said[-5000:]
            assert time.monotonic() < deadline, self.said[-5000:]
            time.sleep(POLL_SECONDS)

    def ends(self, code: int = 0) -> str:
        assert self.process.wait(200) == code, self.said[-5000:]
        return self.said

    def workers(self) -> set[int]:
        """Processes that train now, or are about to."""
        return {process.pid for process in ray_workers(self._cluster, "RayTrainWorker")}

    def steps_taken(self) -> Counter[int]:
        """How often each step was taken, by the lines that rank 0 logs: one a step if the settings say so."""
        files = temp_dir(self._cluster.root).glob("session_2*/logs/worker-*.err")
        # a set: Ray writes each line of a worker twice
        lines = {line for file in files for line in file.read_text(errors="replace").splitlines()}
        records = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        own = [one for one in records if one.get("run") == self.plan.config.name]
        return Counter(one["step"] for one in own if one["message"].startswith("loss "))

    def kill_a_worker(self, chance: random.Random) -> None:
        self.wait_until(lambda: bool(self.workers()))
        chance.choice(ray_workers(self._cluster, "RayTrainWorker")).kill()

    def kill_the_driver(self) -> None:
        self.end(signal.SIGKILL)
        self.again()

    def kill_the_head(self) -> None:
        state = read_state(self._cluster.root)
        assert state is not None
        kill(state.services["ray"].identity)
        assert self.process.wait(120) == 1, self.said[-5000:]
        # the second where the head dies while the job joins the cluster, for the first time or after a lost group
        reasons = ("failed: the Ray cluster was lost while training", "failed: Ray's dashboard at")
        assert any(reason in self.said for reason in reasons), self.said[-5000:]


def ema_of(plan: TrainPlan) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None
    assert checkpoint.record.step == STEPS
    return {name: value for name, value in checkpoint.tensors.items() if name.startswith("ema/")}


def series_of(plan: TrainPlan) -> dict[str, list[tuple[int, float]]]:
    """What MLflow has of the training's metrics: each point once, in order."""
    config = plan.config
    run = find_run(config.track.experiment, f"train/{config.name}-{plan.identity}-{config.steps}")
    assert run is not None
    assert run.status == "FINISHED"
    client = tracking_client()
    names = [name for name in client.get_run(run.run_id).data.metrics if name.startswith("train/")]
    assert "train/loss" in names
    return {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run.run_id, name))
        for name in names
    }


def expected_series(calm: Outcome, name: str) -> list[tuple[int, float]]:
    return sorted((step, point[name]) for step, point in calm.points.items() if name in point)


def require_same(plan: TrainPlan, calm: Outcome) -> None:
    """The same weights, bit for bit, and the same charts."""
    expected, found = calm.checkpoint, ema_of(plan)
    assert expected is not None
    assert found
    for name, value in found.items():
        assert torch.equal(expected.tensors[name], value), name
    for name, series in series_of(plan).items():
        steps, values = zip(*expected_series(calm, name), strict=True)
        assert tuple(step for step, _ in series) == steps, name
        # a point cut in two by the stop is summed in another order: equal to the last digits of a float64
        assert [value for _, value in series] == pytest.approx(values, rel=1e-12), name


def test_killed_at_several_places_it_ends_in_the_same_weights_and_the_same_charts(
    data: str,
    prefix: str,
    tmp_path: Path,
    cluster: LocalStack,
    node: list[Node],
    relays: Relays,
    calm: Outcome,
    record_property: Callable[[str, object], None],
    has_two_nodes: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chance = random.Random(int(os.environ.get("DDPM_TEST_SEED", "5")))
    job = Job(config_of(data, prefix, "killed"), tmp_path, cluster, relays)
    chronicle = Chronicle(job.step, job.log)

    def kill_a_worker() -> None:
        job.kill_a_worker(chance)

    def kill_a_worker_in_an_outage() -> None:
        job.kill_a_worker(chance)
        relays.outage()

    def lose_the_node() -> None:
        remove_node(cluster, node[0], suddenly=True)
        node[0] = add_node(cluster, 1)

    def lose_the_head() -> None:
        job.kill_the_head()
        for one in node:  # without a head it would end by itself, some time
            remove_node(cluster, one, suddenly=True)
        cluster.up()
        node[:] = [add_node(cluster, 1) for _ in node]
        job.again()

    def ask_to_end() -> None:
        assert job.end(signal.SIGTERM, 60) == 143, job.said[-5000:]
        assert "saving a checkpoint, then ending" in job.said
        job.again()

    strikes = [kill_a_worker_in_an_outage, job.kill_the_driver, lose_the_head]
    if has_two_nodes:
        strikes += [kill_a_worker, lose_the_node, ask_to_end]
    chance.shuffle(strikes)
    try:
        for number, strike in enumerate(strikes):
            # all within the first half: what is left must take longer than to see that it is time
            job.wait_for_step(int((number + chance.random()) * STEPS / 2 / len(strikes)))
            with chronicle.strike(strike.__name__):
                strike()
        assert "resuming at step" in job.ends()
    finally:
        record_property(PROPERTY, chronicle.end())

    require_same(job.plan, calm)
    assert ddpm("train", f"--config={tmp_path / 'train.json'}") == 0
    assert f"already trained: killed has all {STEPS} steps; nothing to do" in capsys.readouterr().out
    assert resolve("killed@champion").version == resolve("killed@challenger").version == 1


@pytest.mark.long
def test_an_elastic_group_shrinks_with_a_lost_node_and_grows_with_one_that_comes(
    data: str,
    prefix: str,
    tmp_path: Path,
    cluster: LocalStack,
    node: list[Node],
    relays: Relays,
    calm: Outcome,
) -> None:
    config = config_of(
        data,
        prefix,
        "elastic",
        data={"uri": data, "memory_bytes": 0},  # every sample is asked for, so the store sets the pace
        workers={"num_workers": [1, 2], "resize_seconds": 2.0},
        checkpoint={"every_steps": 20},
    )
    job = Job(config, tmp_path, cluster, relays)
    job.wait_for_step(60)
    first = job.workers()
    assert len(first) == 2
    relays.s3.switch("delay")  # or it would be done before the node is back
    remove_node(cluster, node[0], suddenly=True)
    job.wait_until(lambda: len(job.workers() - first) == len(job.workers()) == 1)
    shrunk = job.workers()
    node[0] = add_node(cluster, 1)
    job.wait_until(lambda: len(job.workers() - shrunk) == len(job.workers()) == 2)
    relays.s3.switch("open")
    job.ends()
    assert ema_of(job.plan)
    series = series_of(job.plan)["train/loss"]
    steps, values = zip(*expected_series(calm, "train/loss"), strict=True)
    assert tuple(step for step, _ in series) == steps
    assert [value for _, value in series] == pytest.approx(values, abs=1e-4)


DRAINED = re.compile(r"Ray drains node (\S+): the workers saved a checkpoint at step (\d+) and ended")
NOTICE_SECONDS = 30


@pytest.mark.long
@pytest.mark.parametrize("elastic", [False, True])
def test_a_drained_node_costs_no_step(
    elastic: bool,
    data: str,
    prefix: str,
    tmp_path: Path,
    cluster: LocalStack,
    node: list[Node],
    calm: Outcome,
    record_property: Callable[[str, object], None],
) -> None:
    """Workers go on elsewhere, or fewer of them, from the step before the node was left."""
    if not elastic:
        node.append(add_node(cluster, 1))
    config = config_of(
        data,
        prefix,
        f"drained-{elastic}".lower(),
        workers={"num_workers": [1, 2] if elastic else 2, "max_failures": 0},
        checkpoint={"every_steps": STEPS},
        log_every_steps=1,
    )
    job = Job(config, tmp_path, cluster, more={FORM_VARIABLE: "json"})
    job.wait_until(lambda: job.steps_taken().total() >= 5)
    workers = ray_workers(cluster, "RayTrainWorker")
    for worker in workers:  # or they would be done before Ray knows
        worker.suspend()
    leaving = next(one for one in node if trains_on(cluster, one))
    give_notice(cluster, leaving, NOTICE_SECONDS)
    for worker in workers:
        worker.resume()
    noticed = time.monotonic()
    job.wait_until(lambda: 0 < job.step() < STEPS)
    saved, took = job.step(), time.monotonic() - noticed
    job.wait_until(lambda: time.monotonic() - noticed > NOTICE_SECONDS)
    remove_node(cluster, leaving, suddenly=True)
    node.remove(leaving)
    said = job.ends()
    taken = job.steps_taken()
    repeated = taken.total() - len(taken)
    record_property(
        PROPERTY, [f"checkpoint at step {saved} {took:.1f} s after the notice; {repeated} steps repeated"]
    )
    assert set(taken) == set(range(1, STEPS + 1))
    assert repeated == 0
    assert DRAINED.findall(said) == [(leaving.address, str(saved))]
    if elastic:
        assert ema_of(job.plan)
    else:
        expected = calm.checkpoint
        assert expected is not None
        assert all(torch.equal(expected.tensors[name], value) for name, value in ema_of(job.plan).items())


def trains_on(cluster: LocalStack, node: Node) -> bool:
    """Whether a worker of a training stands on this node."""
    family = psutil.Process(node.identity.pid).children(recursive=True)
    return any(worker in family for worker in ray_workers(cluster, "RayTrainWorker"))


@pytest.mark.long
def test_what_would_fail_again_is_not_tried_again_and_told_in_one_line(
    stack: LocalStack,
    data: str,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(
        data,
        prefix,
        "diverged",
        workers={"num_workers": 1, "max_failures": 3},
        optimizer={"lr": 1e30},
        max_skipped_steps=0,
    )
    monkeypatch.setenv(HEALTH_CHECK_VARIABLE, "0.2")
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"train": config.model_dump(mode="json")}))
    workers: set[int] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            workers.update(process.pid for process in ray_workers(stack, "RayTrainWorker"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert ddpm("train", f"--config={file}") == 1
    finally:
        over.set()
        watcher.join()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(said) == 1
    assert "gradient norm" in said[0]
    assert "positions" in said[0]
    # the group that met it, and the one after it, which is told so and ends; not one for each of max_failures
    assert 1 <= len(workers) <= 2
