"""Several jobs that fill one prefix make hardly a shard twice, whoever of them dies and whatever heartbeats say."""

import json
from collections.abc import Callable

import pytest

import ddpm_pipeline.generate.sharing as sharing
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.generate.heartbeat import (
    EVERY_SECONDS,
    Heartbeat,
    clear_ended,
    make_heartbeat,
    read_heartbeats,
)
from ddpm_pipeline.generate.sharing import (
    CLAIM_SECONDS,
    OtherJobs,
    in_order,
)
from ddpm_pipeline.generate.spec import canonical
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.jobs.generate import as_document, summary
from ddpm_pipeline.store import StoreUnreachable
from tests.effort import long
from tests.generate.inprocess import MemoryStore
from tests.generate.tiny import contents, plan_of, settings, tiny_model
from tests.generate.virtual_jobs import Job, in_virtual_time

NUM_SHARDS = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> GenerateConfig:
    """Sixty shards; one attempt at each, which being left to another job must not use up."""
    model = tiny_model(tmp_path_factory.mktemp("model"))
    small: dict[str, object] = {"shard_size": 2, "batch_size": 2, "image_format": "npy", "max_attempts": 1}
    return settings(model, "file:///nowhere", count=2 * NUM_SHARDS - 1, num_workers=1, **small)


@pytest.fixture(scope="module")
def alone(config: GenerateConfig) -> dict[str, bytes]:
    """What one undisturbed job leaves."""
    objects: dict[str, bytes] = {}
    with in_virtual_time() as world:
        job = Job(world, config, objects, 1.0)
        world.run()
    assert made(job) == NUM_SHARDS
    return contents(MemoryStore(objects))


def made(*jobs: Job) -> int:
    """Shards that complete jobs say they have made."""
    for job in jobs:
        assert job.result is not None
        assert (job.result.status, job.result.failed) == ("complete", {})
    return sum(job.result.shards_made for job in jobs if job.result is not None)


def twice(*jobs: Job) -> int:
    return sum(job.result.shards_made_twice for job in jobs if job.result is not None)


@pytest.mark.parametrize("late_seconds", [0.0, long(0.3), 3.0])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("seconds", [0.4, long(1.1), 3.0, long(12.0), long(50.0)])
def test_two_jobs_share_the_work_and_make_no_shard_twice(
    seconds: float, workers: int, late_seconds: float, config: GenerateConfig, alone: dict[str, bytes]
) -> None:
    objects: dict[str, bytes] = {}
    config = config.model_copy(update={"num_workers": workers})
    with in_virtual_time() as world:
        jobs = [Job(world, config, objects, seconds, at) for at in (0.0, late_seconds)]
        world.run()
    assert (made(*jobs), twice(*jobs)) == (NUM_SHARDS, 0)
    assert contents(MemoryStore(objects)) == alone
    # At the end neither waits long for what the other has in hand and has announced.
    ideal = (NUM_SHARDS / workers * seconds + late_seconds) / 2
    assert max(job.ended_at for job in jobs) <= ideal + 1.1 * seconds + 2 * EVERY_SECONDS
    for job in jobs:
        assert job.result is not None
        assert len(job.result.concurrent_jobs) == 1
        assert "twice    0 shards, which another job finished first" in summary(job.result)
        assert json.loads(json.dumps(as_document(job.result)))["shards_made_twice"] == 0


def test_five_jobs_of_different_speed_share_the_work(config: GenerateConfig, alone: dict[str, bytes]) -> None:
    objects: dict[str, bytes] = {}
    with in_virtual_time() as world:
        jobs = [Job(world, config, objects, 1.0 + at, at) for at in (0.0, 1.0, 2.0, 3.0, 4.0)]
        world.run()
    assert made(*jobs) == NUM_SHARDS
    assert twice(*jobs) <= 1
    assert contents(MemoryStore(objects)) == alone


@pytest.mark.parametrize("dies_at", [0.3, long(2.2), 31.7, long(57.0), 88.5])
def test_the_shards_of_a_job_that_is_killed_are_made_by_the_other(
    dies_at: float, config: GenerateConfig, alone: dict[str, bytes]
) -> None:
    objects: dict[str, bytes] = {}
    with in_virtual_time() as world:
        survivor, other = (Job(world, config, objects, 3.0, at) for at in (0.0, 0.2))
        other.dies_at = dies_at
        world.run()
    assert other.result is None
    made(survivor)
    assert twice(survivor) == 0
    assert contents(MemoryStore(objects)) == alone
    left_alone = max(dies_at + CLAIM_SECONDS, NUM_SHARDS * 3.0 - dies_at)
    assert survivor.ended_at <= left_alone + 3 * 3.0 + 2 * EVERY_SECONDS


def test_a_job_with_nothing_else_to_do_waits_and_says_for_whom(config: GenerateConfig) -> None:
    objects: dict[str, bytes] = {}
    with in_virtual_time() as world:
        slow, quick = Job(world, config, objects, 40.0), Job(world, config, objects, 0.5)
        world.run()
    assert (made(slow, quick), twice(slow, quick)) == (NUM_SHARDS, 0)
    (said,) = {note for note in quick.progress if "waiting for 1 " in note}
    assert said == "0 shards in progress, waiting for 1 shards of " + " and ".join(
        quick.result.concurrent_jobs if quick.result is not None else ()
    )


def heartbeat(config: GenerateConfig, job: str, shards: list[str], **fields: object) -> Heartbeat:
    """What a job writes that has these shards in hand and announces the same."""
    spec = plan_of(config)[0]
    beat = make_heartbeat(job, spec, "running", began_at=1e9, images_made=0, in_progress=[], failed={})
    unit = {"worker": "w", "seconds": 0.0, "images": 0}
    in_hand = [{"shard": name, **unit} for name in shards]
    document = beat.model_dump(mode="json") | {"under_way": in_hand, "announced": shards} | fields
    return Heartbeat.model_validate(document)


ALL = [f"{number:06d}" for number in range(NUM_SHARDS)] + [f"{NUM_SHARDS - 1:06d}-0001"]


FORGED: dict[str, Callable[[GenerateConfig], bytes]] = {
    "no document": lambda config: b"\x00garbage",
    "nested": lambda config: b"[" * 100_000,
    "has everything": lambda config: document(heartbeat(config, "zz", ALL)),
    "of the future": lambda config: document(heartbeat(config, "00", ALL, updated_at=253_000_000_000.0)),
    "of another generation": lambda config: document(heartbeat(config, "zz", ALL, spec_digest="0" * 64)),
    "odd names": lambda config: document(heartbeat(config, "zz", ["../spec", "000000-", "9" * 40, "-1"])),
    "of the job itself": lambda config: document(heartbeat(config, "job-90", ALL)),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_forged_heartbeat_costs_a_short_wait_at_most(
    forge: Callable[[GenerateConfig], bytes], config: GenerateConfig, alone: dict[str, bytes]
) -> None:
    objects: dict[str, bytes] = {}
    with in_virtual_time() as world:

        def put() -> None:
            objects["jobs/forged.json"] = forge(config)

        world.start(put, 10.0)
        job = Job(world, config, objects, 3.0)
        world.run()
    assert made(job) == NUM_SHARDS
    assert contents(MemoryStore(objects)) == alone
    assert job.ended_at <= NUM_SHARDS * 3.0 + CLAIM_SECONDS + 2 * EVERY_SECONDS


def document(beat: Heartbeat) -> bytes:
    return canonical(beat.model_dump(mode="json"))


def test_a_job_that_lives_and_does_nothing_keeps_its_shards_for_a_limited_time(
    config: GenerateConfig, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "STUCK_SECONDS", 60.0)
    objects: dict[str, bytes] = {}
    with in_virtual_time() as world:
        job = Job(world, config, objects, 0.5)

        def hang() -> None:
            while world.now < 120:
                beat = heartbeat(config, "zz", ["000041"], updated_at=1_800_000_000.0 + world.now)
                objects["jobs/zz.json"] = document(beat)
                world.sleep(EVERY_SECONDS)

        world.start(hang, 1.0)
        world.run()
    assert made(job) == NUM_SHARDS
    assert 60 < job.ended_at < 70
    objects.pop("jobs/zz.json")
    assert contents(MemoryStore(objects)) == alone


def test_heartbeats_of_earlier_versions_are_read_and_their_shards_in_hand_left_alone(
    config: GenerateConfig,
) -> None:
    generation = Generation(MemoryStore({}), plan_of(config)[0])
    earlier = heartbeat(config, "zz", ["000007", "000059", "000059-0001"]).model_dump(mode="json")
    del earlier["announced"]
    generation.store.write("jobs/zz.json", canonical(earlier))
    others = OtherJobs(generation, "me")
    others.look()
    assert others.held() == {7, 59}  # 59 as the tail of this count


def test_a_heartbeat_that_is_just_being_replaced_still_holds_what_it_held(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a gateway answers half a request for an object that is overwritten every two seconds."""
    store = MemoryStore({})
    generation = Generation(store, plan_of(config)[0])
    for job in ("a", "b"):
        store.write(f"jobs/{job}.json", document(heartbeat(config, job, [f"00000{ord(job) % 8}"])))
    others = OtherJobs(generation, "me")
    others.look()
    read = MemoryStore.read

    def half(store: MemoryStore, key: str) -> bytes:
        if key == "jobs/a.json":
            raise StoreUnreachable(f"{key}: half an answer")
        return read(store, key)

    store.delete("jobs/b.json")
    monkeypatch.setattr(MemoryStore, "read", half)
    clear_ended(store)
    others.look()
    assert others.held() == {1}
    assert read_heartbeats(store) == []
    assert list(store.objects) == ["jobs/a.json"]


def test_two_that_announce_the_same_shard_agree_on_whose_it_is(config: GenerateConfig) -> None:
    generation = Generation(MemoryStore({}), plan_of(config)[0])
    beats = {job: heartbeat(config, job, ["000001"], under_way=[]) for job in ("a", "b")}
    for job, beat in beats.items():
        generation.store.write(f"jobs/{job}.json", document(beat))
    held: dict[str, set[int]] = {}
    for job in beats:
        others = OtherJobs(generation, job)
        others.announce([1])
        others.look()
        held[job] = others.held()
    assert held == {"a": set(), "b": {1}}
    late = OtherJobs(generation, "0")  # it has not announced the shard, so its name decides nothing
    late.look()
    assert late.held() == {1}


def test_each_job_begins_where_others_are_far(config: GenerateConfig) -> None:
    numbers = list(range(0, 80, 10))
    assert in_order(numbers, 0) == numbers
    assert in_order(numbers, 1) == numbers[::-1]
    assert in_order(numbers, 2) == [40, 50, 60, 70, 0, 10, 20, 30]
    assert in_order(numbers, 3) == [30, 20, 10, 0, 70, 60, 50, 40]
    assert [in_order(numbers, rank)[0] for rank in (4, 6, 8)] == [20, 60, 10]
    assert all(sorted(in_order(numbers, rank)) == numbers for rank in range(20))
    assert in_order([], 3) == []


def test_records_are_listed_between_two_shards_only(config: GenerateConfig) -> None:
    generation = Generation(MemoryStore({}), plan_of(config)[0])
    for name in ("000000", "000003", "000004", "000004-0001", "000007", "000059-0001", "x"):
        generation.store.write(f"done/{name}.json", b"{}")
    assert generation.recorded_between(0, 59) == {0, 3, 4, 7, 59}
    assert generation.recorded_between(3, 5) == {3, 4}
    assert generation.recorded_between(59, 59) == {59}
