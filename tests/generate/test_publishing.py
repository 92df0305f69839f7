"""Drivers that are suspended before any of their writes and wake up later take nothing back that others published."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.generate.completeness import check_complete
from ddpm_pipeline.generate.driver import generate
from ddpm_pipeline.generate.prefix_spec import find_generation
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.store import open_store
from tests.generate.inprocess import Driver, MemoryStore, run_alone, without_cluster
from tests.generate.tiny import contents, plan_of, settings, tiny_model

SMALL, LARGE, LARGEST = 15, 18, 25  # shards of ten: tails of one number, and one beyond


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    with without_cluster():
        yield


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, GenerateConfig]:
    """Settings of one generation by count."""
    model = tiny_model(tmp_path_factory.mktemp("model"))
    return {n: settings(model, "file:///nowhere", count=n) for n in (10, SMALL, LARGE, LARGEST)}


@pytest.fixture(scope="module")
def at_once(configs: dict[int, GenerateConfig]) -> dict[int, dict[str, bytes]]:
    """What undisturbed generations leave, by count, times aside."""
    found: dict[int, dict[str, bytes]] = {}
    for count, config in configs.items():
        objects: dict[str, bytes] = {}
        result = run_alone(config, objects).result
        assert result is not None
        assert result.status == "complete"
        found[count] = contents(MemoryStore(objects))
    return found


def spec_of(configs: dict[int, GenerateConfig], count: int) -> Spec:
    return plan_of(configs[count])[0]


def is_whole(objects: dict[str, bytes], spec: Spec, expected: dict[str, bytes]) -> None:
    """The prefix holds the generation of this count and nothing else."""
    store = MemoryStore(objects)
    generation = Generation(store, spec)
    assert find_generation(store) == generation
    assert check_complete(generation).complete, check_complete(generation).faults
    assert contents(store) == expected


def begun(configs: dict[int, GenerateConfig], count: int) -> dict[str, bytes]:
    """A prefix at which a generation of this count is complete, or nothing for 0."""
    if count not in _begun:
        _begun[count] = {}
        run_alone(configs[count], _begun[count])
    return dict(_begun[count])


_begun: dict[int, dict[str, bytes]] = {0: {}}


def places(configs: dict[int, GenerateConfig], before: int, count: int) -> list[int]:
    """Numbers of the writes and deletes that a generation of `count` makes at a prefix of `before`, but for those of
    shards and records, of which only the last counts."""
    steps = run_alone(configs[count], begun(configs, before)).steps
    made = [n for n, step in enumerate(steps, 1) if step.startswith(("write shards", "write done"))]
    return [n for n in range(1, len(steps) + 1) if n not in made[:-1]]


@pytest.mark.parametrize("before", [0, 10])
def test_a_driver_suspended_anywhere_leaves_a_larger_generation_as_it_is(
    before: int, configs: dict[int, GenerateConfig], at_once: dict[int, dict[str, bytes]]
) -> None:
    endings: set[str] = set()
    for place in places(configs, before, SMALL):
        objects = begun(configs, before)
        asleep = Driver(configs[SMALL], objects, stop_at=place)
        assert asleep.start()
        larger = run_alone(configs[LARGE], objects)
        assert larger.result is not None, (place, larger.error)
        assert larger.result.status == "complete"
        is_whole(objects, spec_of(configs, LARGE), {**at_once[LARGE], **_claims(objects)})
        asleep.resume()
        endings.add(_ending(asleep))
        is_whole(objects, spec_of(configs, LARGE), at_once[LARGE])
    assert endings <= {
        "superseded: another job published 18 images",
        f"refused: file://{Path.cwd()}/nowhere: count is 18 at this prefix and can only be raised, not lowered to 15; "
        "choose another output prefix, or raise count",
        "complete: None",  # it was at its last deletes
    }
    assert "superseded: another job published 18 images" in endings


def test_two_drivers_suspended_at_any_two_places_end_with_the_larger_generation(
    configs: dict[int, GenerateConfig], at_once: dict[int, dict[str, bytes]]
) -> None:
    for place in places(configs, 10, SMALL):
        for other in places(configs, 10, LARGE):
            objects = begun(configs, 10)
            small = Driver(configs[SMALL], objects, stop_at=place)
            large = Driver(configs[LARGE], objects, stop_at=other)
            small.start()
            large.start()
            small.resume()
            large.resume()
            assert large.result is not None, (place, other, large.error)
            assert large.result.status == "complete", (place, other)
            is_whole(objects, spec_of(configs, LARGE), at_once[LARGE])


@pytest.mark.parametrize("seed", range(25))
def test_three_drivers_of_which_some_die_are_made_good_by_the_same_command(
    seed: int, configs: dict[int, GenerateConfig], at_once: dict[int, dict[str, bytes]]
) -> None:
    chance = random.Random(seed)
    objects = begun(configs, chance.choice([0, 10]))
    drivers = [Driver(configs[n], objects, chance.randint(1, 14)) for n in (SMALL, LARGE, LARGEST)]
    chance.shuffle(drivers)
    asleep = [driver for driver in drivers if driver.start()]
    chance.shuffle(asleep)
    for driver in asleep:
        if chance.random() < 0.4:
            driver.kill()
        else:
            driver.resume()
    last = run_alone(configs[LARGEST], objects)
    assert last.result is not None, last.error
    assert last.result.status in ("complete", "already complete")
    again = run_alone(configs[LARGEST], objects)
    assert again.result is not None
    assert again.result.status == "already complete"
    is_whole(objects, spec_of(configs, LARGEST), at_once[LARGEST])


def test_an_old_manifest_over_a_newer_one_is_replaced_by_the_next_command(
    configs: dict[int, GenerateConfig], at_once: dict[int, dict[str, bytes]]
) -> None:
    """As a driver leaves it that wakes up, writes, and dies before it looks again."""
    small, objects = begun(configs, SMALL), begun(configs, LARGE)
    for key in ("spec.json", "report.html", "contact-sheet.png", "manifest.json"):
        objects[key] = small[key]
        found = find_generation(MemoryStore(objects))
        assert found is not None
        assert found.spec == spec_of(configs, LARGE)
        result = run_alone(configs[LARGE], objects).result
        assert result is not None
        assert result.status in ("complete", "already complete")
        if key != "contact-sheet.png":  # which is written after the report, and so never alone
            is_whole(objects, spec_of(configs, LARGE), at_once[LARGE])


def test_what_is_no_record_of_this_generation_raises_no_count(configs: dict[int, GenerateConfig]) -> None:
    objects = begun(configs, SMALL)
    record = json.loads(objects["done/000001-0005.json"])
    objects["done/000002.json"] = json.dumps(record | {"spec_digest": "0" * 64}).encode()
    objects["done/000001-0007.json"] = b"{"
    objects["done/999999999999999.json"] = b"{}"
    objects["done/000001-0000.json"] = objects["done/000001-9999.json"] = b"{}"
    found = find_generation(MemoryStore(objects))
    assert found is not None
    assert found.spec == spec_of(configs, SMALL)


@pytest.mark.parametrize(
    "gone",
    ["shards/000001.tar", "done/000000.json", "shards/000001-0008.tar", "manifest.json", "report.html"],
)
def test_what_is_gone_of_a_complete_generation_is_made_by_the_same_command(
    gone: str, configs: dict[int, GenerateConfig], at_once: dict[int, dict[str, bytes]]
) -> None:
    objects = begun(configs, LARGE)
    objects.pop(gone, None)
    run_alone(configs[LARGE], objects)
    is_whole(objects, spec_of(configs, LARGE), at_once[LARGE])


@pytest.mark.parametrize("torn", ["shards/000000.tar", "done/000000.json", "manifest.json"])
def test_what_is_torn_of_a_complete_generation_is_made_by_the_same_command(
    torn: str, configs: dict[int, GenerateConfig], at_once: dict[int, dict[str, bytes]]
) -> None:
    objects = begun(configs, LARGE)
    objects[torn] = objects[torn][: len(objects[torn]) // 2]
    result = run_alone(configs[LARGE], objects).result
    assert result is not None
    assert result.status == "complete"
    is_whole(objects, spec_of(configs, LARGE), at_once[LARGE])


SUSPENDED = """
import os, signal, sys
import ddpm_pipeline.generate.finalize as finalize
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.generate.driver import generate
from tests.generate.inprocess import without_cluster
real = finalize.write_manifest
def suspended(store, manifest, entries):
    finalize.write_manifest = real
    os.kill(os.getpid(), signal.SIGSTOP)  # between the last look and the write, as a closed lid does it
    real(store, manifest, entries)
finalize.write_manifest = suspended
with without_cluster():
    result = generate(GenerateConfig.model_validate_json(sys.argv[1]))
print(result.status, result.reason)
"""


@pytest.mark.long
def test_a_stopped_process_that_goes_on_gives_way_to_what_was_published_meanwhile(
    configs: dict[int, GenerateConfig], at_once: dict[int, dict[str, bytes]], tmp_path: Path
) -> None:
    small, large = (
        configs[n].model_copy(update={"output": f"file://{tmp_path}/out"}) for n in (SMALL, LARGE)
    )
    words = [sys.executable, "-c", SUSPENDED, small.model_dump_json()]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}
    ) as other:
        try:
            _, state = os.waitpid(other.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(state)
            assert generate(large).status == "complete"
            assert verify(large.output).ok
        finally:
            other.send_signal(signal.SIGCONT)
        said, _ = other.communicate(timeout=60)
    assert said == "superseded another job published 18 images\n"
    assert contents(open_store(large.output)) == at_once[LARGE]
    assert verify(large.output).ok


def _claims(objects: dict[str, bytes]) -> dict[str, bytes]:
    return {key: data for key, data in objects.items() if key.startswith(("claims/", "jobs/"))}


def _ending(driver: Driver) -> str:
    if driver.result is not None:
        return f"{driver.result.status}: {driver.result.reason}"
    return f"refused: {driver.error}"
