"""Jobs that claim one empty prefix at once agree on one spec, whatever the order of their requests and whoever dies."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.generate.layout import CLAIM_PREFIX, SPEC_KEY
from ddpm_pipeline.generate.prefix_spec import check_prefix, claim_prefix
from ddpm_pipeline.generate.spec import Spec, read_spec, require_extension
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.store import FileStore, ObjectInfo, ObjectMissing, Store, consensus, open_store
from ddpm_pipeline.store.prefix_claim import clear_claims
from tests.effort import is_long
from tests.generate.tiny import plan_of, settings, tiny_model
from tests.s3_servers import SERVERS, open_place
from tests.turns import Died, Turns

JOBS = 3
ORDERS = 150 if is_long() else 40


class Stepped(FileStore):
    """Objects in memory; each request waits for its job's turn, and may be the job's last."""

    def __init__(self, objects: dict[str, bytes], turns: Turns, job: int, dies_at: int | None) -> None:
        super().__init__(Path("nowhere"))
        self._objects, self._turns, self._job = objects, turns, job
        self._left = dies_at

    def _step(self) -> None:
        self._turns.next()
        self._turns.wait(self._job)
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Died

    def read(self, key: str) -> bytes:
        self._step()
        if key not in self._objects:
            raise ObjectMissing(key)
        return self._objects[key]

    def write(self, key: str, data: bytes, *, replaces: str | None = None) -> ObjectInfo:
        self._step()
        assert key not in self._objects or key == SPEC_KEY, "a ballot is never overwritten"
        self._objects[key] = data
        return ObjectInfo(key, len(data), "")

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        self._step()
        return iter(
            [ObjectInfo(k, len(v), "") for k, v in sorted(self._objects.items()) if k.startswith(prefix)]
        )

    def delete(self, key: str) -> None:
        self._step()
        self._objects.pop(key, None)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> list[Spec]:
    """Specs of different seeds."""
    model = tiny_model(tmp_path_factory.mktemp("model"))
    return [plan_of(settings(model, "file:///nowhere", seed=seed))[0] for seed in range(JOBS)]


def _no_pause(seconds: float) -> None:
    """What the turns decide needs no waiting for."""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses: the turns decide."""
    monkeypatch.setattr(consensus.time, "sleep", _no_pause)


def race(seed: int, specs: list[Spec], dying: dict[int, int]) -> tuple[list[Spec], dict[str, bytes]]:
    """Claims of all jobs with their requests in an order drawn by `seed`; what the survivors agreed on."""
    turns, objects = Turns(seed, range(JOBS)), dict[str, bytes]()

    def job(number: int) -> Spec | None:
        turns.wait(number)
        try:
            return claim_prefix(
                Generation(Stepped(objects, turns, number, dying.get(number)), specs[number])
            ).spec
        except Died:
            return None
        finally:
            turns.next(ended=number)

    with ThreadPoolExecutor(JOBS) as pool:
        agreed = list(pool.map(job, range(JOBS)))
    return [spec for spec in agreed if spec is not None], objects


@pytest.mark.usefixtures("at_once")
def test_all_jobs_agree_on_one_spec_in_any_order_of_requests(specs: list[Spec]) -> None:
    winners: set[int] = set()
    for seed in range(ORDERS):
        agreed, objects = race(seed, specs, {})
        assert len(agreed) == JOBS
        assert {spec.seed for spec in agreed} == {agreed[0].seed}
        assert Spec.model_validate_json(objects[SPEC_KEY]) == agreed[0]
        assert list(objects) == [SPEC_KEY]
        winners.add(agreed[0].seed)
    assert winners == set(range(JOBS))


@pytest.mark.usefixtures("at_once")
def test_a_job_that_dies_at_any_request_blocks_no_other_and_changes_no_decision(specs: list[Spec]) -> None:
    for seed in range(ORDERS):
        chance = random.Random(seed)
        dying = {job: chance.randrange(12) for job in chance.sample(range(JOBS), chance.randint(1, JOBS - 1))}
        agreed, objects = race(seed, specs, dying)
        assert len({spec.seed for spec in agreed}) == 1
        assert Spec.model_validate_json(objects[SPEC_KEY]) == agreed[0]


def test_claims_of_dead_jobs_are_not_foreign_and_are_deleted(specs: list[Spec], tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/out")
    store.write(f"{CLAIM_PREFIX}dead.0004.json", b'{"round": 3}')
    assert check_prefix(Generation(store, specs[0])) is None
    assert claim_prefix(Generation(store, specs[0])).spec == specs[0]
    clear_claims(store, CLAIM_PREFIX)
    assert [info.key for info in store.list()] == [SPEC_KEY]
    store.write(f"{CLAIM_PREFIX}x.0000.json", b"{}")
    with pytest.raises(DamageError, match=r"claims/x\.0000\.json: not a claim"):
        claim_prefix(Generation(store, specs[0]))


@pytest.mark.parametrize("kind", ["file", *SERVERS, pytest.param("gateway", marks=pytest.mark.stack)])
def test_of_different_jobs_at_an_empty_prefix_one_wins_and_the_others_are_refused(
    kind: str, specs: list[Spec], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = f"file://{tmp_path}" if kind == "file" else open_place(kind, request).uri
    for turn in range(5 if kind in ("file", "gateway") or is_long() else 2):
        store: Store = open_store(f"{base}/{turn}")
        start = threading.Barrier(JOBS)

        def job(spec: Spec, store: Store = store, start: threading.Barrier = start) -> str:
            start.wait(30)
            try:
                require_extension(store.uri, claim_prefix(Generation(store, spec)).spec, spec)
            except UserError as error:
                return str(error)
            return "won"

        with ThreadPoolExecutor(JOBS) as pool:
            agreed = list(pool.map(job, specs))
        assert agreed.count("won") == 1
        winner = read_spec(store)
        assert winner is not None
        assert winner == specs[agreed.index("won")]
        for number, message in enumerate(agreed):
            assert message == "won" or f"(seed: {winner.seed} stored, {number} requested)" in message
