"""A generation that is killed wherever it hurts ends as if nothing had happened."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from ddpm_pipeline.generate.generation_status import generation_status
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.infra.local.processes import kill
from ddpm_pipeline.infra.local.stack_state import read_state
from ddpm_pipeline.store import Store, open_store
from tests.driving import Driver, ray_workers
from tests.generate.tiny import contents, fill, settings, tiny_model
from tests.ray_nodes import add_node, remove_node

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
NUM_SHARDS = 64


def shards_done(store: Store) -> int:
    return sum(1 for _ in store.list("done/"))


def kill_an_actor(stack: LocalStack, chance: random.Random) -> None:
    """Kill a process that makes shards."""
    actors = ray_workers(stack, "MapWorker")
    if actors:
        chance.choice(actors).send_signal(signal.SIGKILL)


def restart_the_gateway(stack: LocalStack) -> None:
    """Kill the S3 server and start it again."""
    state = read_state(stack.root)
    assert state is not None
    kill(state.services["s3"].identity)
    stack.up()


def test_killed_at_ten_places_it_ends_byte_identical(stack: LocalStack, prefix: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    slow = {"sampler": {"kind": "ddim", "num_steps": 40}, "count": NUM_SHARDS * 8 - 3, "shard_size": 8}
    calm, config = settings(model, f"{prefix}/calm", **slow), settings(model, f"{prefix}/wild", **slow)
    fill(calm)
    chance = random.Random(6)
    store = open_store(config.output)
    before = {info.key for info in open_store("s3://ddpm").list()}
    node = add_node(stack, 1)
    driver = Driver("generate", config, tmp_path)

    def lose_a_node() -> None:
        remove_node(stack, node, suddenly=True)

    disturbances: list[Callable[[], object]] = [
        lambda: kill_an_actor(stack, chance),
        lambda: driver.end(signal.SIGKILL),
        lambda: restart_the_gateway(stack),
        lambda: kill_an_actor(stack, chance),
        lose_a_node,
        lambda: driver.end(signal.SIGTERM),
        lambda: kill_an_actor(stack, chance),
        lambda: restart_the_gateway(stack),
        lambda: driver.end(signal.SIGKILL),
        lambda: kill_an_actor(stack, chance),
    ]
    for number, disturb in enumerate(disturbances):
        # Each strikes while about as many shards have been made as it has predecessors, give or take.
        goal = (number + chance.random()) * NUM_SHARDS / (len(disturbances) + 1)
        _await(lambda goal=goal: shards_done(store) >= goal or driver.process.poll() is not None)
        assert driver.process.poll() is None, driver.said[-3000:]
        disturb()
        driver.again()
    while driver.process.wait(120) != 0:
        driver.again()
    assert contents(store) == contents(open_store(calm.output))
    after = {info.key for info in open_store("s3://ddpm").list()}
    inside = config.output.removeprefix("s3://ddpm/")
    assert {key for key in after - before if not key.startswith(inside)} == set()
    client = boto3.Session().client("s3")  # the default session may remember other keys
    assert "Uploads" not in client.list_multipart_uploads(Bucket="ddpm", Prefix=inside)
    assert generation_status(config.output).state == "complete"


def test_sigterm_drains_and_the_same_command_goes_on(stack: LocalStack, prefix: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    slow = {"sampler": {"kind": "ddim", "num_steps": 40}, "count": 400, "shard_size": 40, "batch_size": 8}
    config = settings(model, prefix, **slow)
    store = open_store(prefix)
    driver = Driver("generate", config, tmp_path)
    _await(lambda: shards_done(store) >= 1)
    assert driver.end(signal.SIGTERM) == 143, driver.said[-3000:]
    status = generation_status(prefix)
    assert status.state == "not complete"
    assert [job.state for job in status.jobs] == ["drained"]
    assert 1 <= status.shards_done < 10
    # Shards in progress were finished or given up whole: every object has its record.
    tars = {info.key[7:-4] for info in store.list("shards/")}
    assert tars == {info.key[5:-5] for info in store.list("done/")}
    driver.again()
    assert driver.process.wait(120) == 0
    assert generation_status(prefix).state == "complete"


def _await(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s; load {os.getloadavg()}")
        time.sleep(0.1)
