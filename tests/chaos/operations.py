"""The operations under attack besides the long jobs: packing, promotion, rollback, nights, cleanup, submission."""

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.evaluation import FeaturesConfig, PromoteConfig
from ddpm_pipeline.config.model_card import ImageShape, ModelCard
from ddpm_pipeline.config.nights import NightlyConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.evaluate.promotion import BEFORE_TAG, VERDICT_TAG, read_champion
from ddpm_pipeline.features.train_classifier import train_features
from ddpm_pipeline.jobs.promote import run as promote
from ddpm_pipeline.nightly.history import read_latest, read_nights
from ddpm_pipeline.store import open_store
from ddpm_pipeline.tracking import (
    Run,
    find_run,
    open_run,
    register,
    set_alias,
    set_tags,
    tracking_client,
    versions,
)
from ddpm_pipeline.tracking.run import HEARTBEAT_TAG, KEY_TAG
from tests.chaos.works import Fingerprint, Generation, Work
from tests.driving import Driver
from tests.generate.tiny import contents, settings, tiny_card, tiny_model
from tests.train.tiny import tiny

NIGHT = "2026-03-01"
NIGHT_SHARDS, NIGHT_SHARD_SIZE = 24, 10
PICTURES, PACKED_SHARD_SIZE = 3_000, 60
APART_SECONDS = 3 * 3600.0  # more than the clock of a driver under attack jumps


class Shared:
    """What several rounds use and none changes, each made when first needed."""

    def __init__(self, place: str, folder: Path) -> None:
        self.data, self._folder = f"{place}/data", folder

    @cached_property
    def pictures(self) -> Path:
        """A folder of small pictures in three class folders."""
        root, random = self._folder / "pictures", np.random.default_rng(0)
        for number in range(PICTURES):
            file = root / f"class{number % 3}" / f"{number:05}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
        return root

    @cached_property
    def judged_data(self) -> str:
        """The digits, with a small classifier beside them."""
        train_features(FeaturesConfig(data=self.data, steps=20, channels=8, min_accuracy=0), lambda *_: None)
        return self.data

    @cached_property
    def teacher(self) -> str:
        """A network of the digits' classes to distil, registered."""
        student = tiny(self.data, "")
        card = ModelCard(
            net=student.net,
            schedule=student.schedule,
            objective=student.objective,
            image=ImageShape(channels=1, size=8),
            class_names=load_index(self.data).class_names,
        )
        self.versions("chaos-teacher", 1, card)
        return "chaos-teacher/1"

    def versions(self, name: str, count: int, card: ModelCard | None = None) -> None:
        """Register `count` tiny models of different weights under `name`."""
        for number in range(count):
            folder = tiny_model(self._folder / f"{name}-{number}", card or tiny_card(size=8), seed=number)
            run = open_run("chaos-models", f"{name}-{number}", key=name, params={}, tags={}, config_yaml="")
            register(name, folder, run.run_id, {}, "a tiny network")

    def gate(self, name: str, challenger: int) -> PromoteConfig:
        """A gate that this version passes, after both models were sampled and measured."""
        set_alias(name, "challenger", challenger)
        return PromoteConfig.model_validate(
            {
                "model": name,
                "gate": {
                    "evaluate": {"reference": self.judged_data},
                    "rules": {"frechet": {"better": "lower", "tolerance": 1e9}},
                    "count": 200,
                    "resamples": 20,
                },
            }
        )


class _Operation:
    """A command whose share of the work is told by its driver's age where the store does not show it."""

    actor = "no worker"  # no process has this name, so faults of workers find none
    typical_seconds = 12.0
    driver: Driver

    def __init__(self, kind: str, place: str, name: str, folder: Path) -> None:
        self.kind, self.place, self.name, self.folder = kind, place, name, folder
        self._began = 0.0

    def run(
        self,
        section: str,
        config: Settings | None,
        variables: Mapping[str, str],
        command: tuple[str, ...] | None = None,
    ) -> None:
        """Start the command."""
        self._began = time.monotonic()
        self.driver = Driver(section, config, self.folder, variables, command=command)

    def done(self) -> float:
        """Share of the work, by the clock."""
        return min(0.99, (time.monotonic() - self._began) / self.typical_seconds)


class Packing(_Operation):
    """3,000 pictures into 50 shards."""

    def __init__(self, shared: Shared, place: str, name: str, folder: Path) -> None:
        super().__init__("packing", place, name, folder)
        self.config = PackConfig(
            source=str(shared.pictures), dest=f"{place}/set", image_size=16, shard_size=PACKED_SHARD_SIZE
        )

    def start(self, variables: Mapping[str, str]) -> None:
        self.run("pack", self.config, variables)

    def done(self) -> float:
        shards = sum(info.key.endswith(".tar") for info in open_store(self.config.dest).list())
        return shards / (PICTURES // PACKED_SHARD_SIZE)

    def fingerprint(self) -> Fingerprint:
        store = open_store(self.config.dest)
        shards = {
            i.key: hashlib.sha256(store.read(i.key)).hexdigest()
            for i in store.list()
            if i.key.endswith(".tar")
        }
        # an index also holds what the store says of its objects, such as ETags; its digest does not
        return shards | {"digest": load_index(self.config.dest).digest}


class Promotion(_Operation):
    """A challenger against a champion; it passes."""

    def __init__(self, shared: Shared, place: str, name: str, folder: Path) -> None:
        super().__init__("promotion", place, name, folder)
        shared.versions(name, 2)
        assert promote(shared.gate(name, 1), lambda *_: None) == 0
        self.config = shared.gate(name, 2)

    def start(self, variables: Mapping[str, str]) -> None:
        self.run("promote", self.config, variables)

    def fingerprint(self) -> Fingerprint:
        return registry(self.name)


class Rollback(_Operation):
    """Three versions were champion, one after the other; the third is taken back."""

    typical_seconds = 6.0

    def __init__(self, shared: Shared, place: str, name: str, folder: Path) -> None:
        super().__init__("rollback", place, name, folder)
        shared.versions(name, 3)
        for version in (1, 2, 3):
            assert promote(shared.gate(name, version), lambda *_: None) == 0

    def start(self, variables: Mapping[str, str]) -> None:
        self.run("rollback", None, variables, ("rollback", self.name))

    def fingerprint(self) -> Fingerprint:
        return registry(self.name)


class Night(_Operation):
    """A night of 24 shards, measured and pointed at."""

    actor = "MapWorker"

    def __init__(self, shared: Shared, place: str, name: str, folder: Path) -> None:
        super().__init__("night", place, name, folder)
        model = "chaos-nights"
        if not versions(model):
            shared.versions(model, 1)
        generate = settings(
            Path(f"{model}/1"),
            f"{place}/nights",
            count=NIGHT_SHARDS * NIGHT_SHARD_SIZE,
            shard_size=NIGHT_SHARD_SIZE,
            sampler={"kind": "ddim", "num_steps": 40},
            num_workers=2,
        )
        self.config = NightlyConfig.model_validate(
            {"generate": generate.model_dump(), "evaluate": {"reference": shared.judged_data, "track": None}}
        )
        self._store = open_store(self.config.generate.output)

    def start(self, variables: Mapping[str, str]) -> None:
        self.run("nightly", self.config, variables, ("nightly", "--from", NIGHT, "--to", NIGHT))

    def done(self) -> float:
        return sum(1 for _ in self._store.list(f"date={NIGHT}/done/")) / NIGHT_SHARDS

    def fingerprint(self) -> Fingerprint:
        night = open_store(f"{self._store.uri}/date={NIGHT}")
        found: dict[str, object] = {
            key: hashlib.sha256(data).hexdigest() for key, data in contents(night).items()
        }
        latest, (record,) = read_latest(self._store), read_nights(self._store)
        found["latest"] = None if latest is None else str(latest.date)
        found["metrics"] = {name: metric.value for name, metric in record.evaluation.metrics.items()}
        return found


class Cleanup(_Operation):
    """One run whose job is long dead and one whose job is alive; by any clock of the attack the first is closed."""

    typical_seconds = 4.0

    def __init__(self, shared: Shared, place: str, name: str, folder: Path) -> None:
        super().__init__("cleanup", place, name, folder)
        self.experiment = f"chaos-{name}"
        alive = self._open("alive")
        set_tags(alive.run_id, {HEARTBEAT_TAG: str(time.time() + APART_SECONDS)})
        last_active = time.time() - APART_SECONDS
        # Only the client that creates a run can say when it started.
        tracking_client().create_run(
            alive.experiment_id, start_time=int(last_active * 1000), tags={KEY_TAG: "dead"}, run_name="dead"
        )
        set_tags(self._open("dead").run_id, {HEARTBEAT_TAG: str(last_active)})

    def _open(self, key: str) -> Run:
        return open_run(self.experiment, key, key=key, params={}, tags={}, config_yaml="")

    def start(self, variables: Mapping[str, str]) -> None:
        self.run("cleanup", None, variables, ("cleanup", "--idle-minutes", "30"))

    def fingerprint(self) -> Fingerprint:
        return {key: run.status for key in ("dead", "alive") if (run := find_run(self.experiment, key))}


class Submission(Generation):
    """The generation, handed to the cluster as a Ray job and followed."""

    kind = "submission"

    def start(self, variables: Mapping[str, str]) -> None:
        self.driver = Driver("generate", self.config, self._folder, variables, command=("submit", "generate"))


def registry(name: str) -> dict[str, object]:
    """Who is champion of a registered model, and what its versions remember."""
    champion, _ = read_champion(name, "champion")
    found: dict[str, object] = {"champion": None if champion is None else champion.version}
    for version in versions(name):
        verdict = version.tags.get(VERDICT_TAG, "")
        before = version.tags.get(BEFORE_TAG)
        found[f"version {version.version}"] = (
            f"{verdict.partition(' at ')[0].replace(name, '')}, after {before}"
        )
    return found


OPERATIONS: dict[str, Callable[[Shared, str, str, Path], Work]] = {
    "packing": Packing,
    "promotion": Promotion,
    "rollback": Rollback,
    "night": Night,
    "cleanup": Cleanup,
    "submission": lambda shared, place, name, folder: Submission(
        folder.parent / "model", place, name, folder
    ),
}
