"""The long jobs under attack, and what must be the same however they were disturbed."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import boto3

from ddpm_pipeline.config.distill_job import DistillConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.distill.plan_distillation import plan_distillation
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.progress import no_progress
from ddpm_pipeline.store import open_store
from ddpm_pipeline.tracking import find_run, resolve, tracking_client
from ddpm_pipeline.train.checkpoint import finished_steps, latest_checkpoint
from ddpm_pipeline.train.run_logger import UNDELIVERED
from ddpm_pipeline.train.training_plan import plan_training
from tests.driving import Driver
from tests.generate.tiny import contents, settings
from tests.train.tiny import tiny

STEPS, NUM_SHARDS, SHARD_SIZE = 480, 48, 8
Fingerprint = Mapping[str, object]


class Work(Protocol):
    """A job that can be started, watched and compared."""

    kind: str
    actor: str
    """What Ray calls its workers."""
    driver: Driver

    def start(self, variables: Mapping[str, str]) -> None: ...

    def done(self) -> float:
        """Share of the work that is safe in the store, 0 to 1."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Everything about the result that no disturbance may change."""
        ...


class Training:
    """Two DDP workers, 480 steps on 8x8 digits, a checkpoint every 40."""

    kind, actor, section = "training", "RayTrainWorker", "train"
    driver: Driver

    def __init__(self, config: TrainConfig | DistillConfig, folder: Path) -> None:
        self._given, self._folder = config, folder
        self._config = plan_distillation(config, no_progress) if isinstance(config, DistillConfig) else config
        self._plan = plan_training(self._config)

    def start(self, variables: Mapping[str, str]) -> None:
        self.driver = Driver(self.section, self._given, self._folder, variables)

    def done(self) -> float:
        return max(finished_steps(self._plan.store), default=0) / STEPS

    def fingerprint(self) -> Fingerprint:
        checkpoint = latest_checkpoint(self._plan.store)
        assert checkpoint is not None
        found: dict[str, object] = {"step": checkpoint.record.step}
        for key, tensor in checkpoint.tensors.items():
            if key != UNDELIVERED:
                found[f"tensor {key}"] = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        name = self._config.name
        run = find_run(self._config.track.experiment, f"train/{name}-{self._plan.identity}-{STEPS}")
        assert run is not None
        found["run"] = run.status
        client = tracking_client()
        for metric in client.get_run(run.run_id).data.metrics:
            if metric.startswith("train/"):
                points = client.get_metric_history(run.run_id, metric)
                found[f"metric {metric}"] = sorted((point.step, point.value) for point in points)
        version = resolve(f"{name}@champion")
        found["model"] = (version.version, version.tags.get("sha256"))
        return found


class Distillation(Training):
    """The same of a student."""

    kind, section = "distillation", "distill"


def training_settings(data: str, place: str, name: str, cache: Path | None) -> dict[str, object]:
    """What a training and a distillation have in common."""
    return {
        "runs": f"{place}/runs",
        "name": name,
        "data": {"uri": data, "cache_dir": str(cache) if cache else None, "cache_bytes": 14_000_000},
        "global_batch": 14,
        "steps": STEPS,
        "log_every_steps": 20,
        "checkpoint": {"every_steps": 40, "eval_samples": 64},
        "workers": {"num_workers": 2, "max_failures": 10},
        "track": {"experiment": f"chaos-{name}", "send_interval_seconds": 0.2},
    }


def training(data: str, place: str, name: str, folder: Path, cache: Path | None) -> Training:
    """The training of a tiny network."""
    common = training_settings(data, place, name, cache)
    grid = {"every_steps": 240, "count": 10, "sampler": {"kind": "ddim", "num_steps": 2}}
    return Training(tiny(data, f"{place}/runs", **common, grid=grid), folder)


def distillation(
    data: str, teacher: str, place: str, name: str, folder: Path, cache: Path | None
) -> Training:
    """The distillation of that network, registered as `teacher`."""
    own: dict[str, object] = {
        "teacher": teacher,
        "sampler": {"kind": "ddim", "num_steps": 4, "guidance_scale": 1.5},
        "grid": {"every_steps": 240, "count": 10, "sampler": {"kind": "consistency", "num_steps": 2}},
    }
    return Distillation(
        DistillConfig.model_validate(training_settings(data, place, name, cache) | own), folder
    )


class Generation:
    """Two workers, 48 shards of 8 images, 40 sampling steps each."""

    kind, actor = "generation", "MapWorker"
    driver: Driver

    def __init__(self, model: Path, place: str, name: str, folder: Path) -> None:
        self.config: GenerateConfig = settings(
            model,
            f"{place}/out",
            count=NUM_SHARDS * SHARD_SIZE - 3,
            shard_size=SHARD_SIZE,
            sampler={"kind": "ddim", "num_steps": 40},
            num_workers=2,
            track={"experiment": f"chaos-{name}", "send_interval_seconds": 0.2},
        )
        self._folder, self._store = folder, open_store(self.config.output)

    def start(self, variables: Mapping[str, str]) -> None:
        self.driver = Driver("generate", self.config, self._folder, variables)

    def done(self) -> float:
        return sum(1 for _ in self._store.list("done/")) / NUM_SHARDS

    def fingerprint(self) -> Fingerprint:
        found: dict[str, object] = {
            key: hashlib.sha256(data).hexdigest() for key, data in contents(self._store).items()
        }
        found["verified"] = verify(self.config.output).ok
        bucket, _, inside = self.config.output.removeprefix("s3://").partition("/")
        uploads = boto3.Session().client("s3").list_multipart_uploads(Bucket=bucket, Prefix=inside)
        found["orphan uploads"] = len(uploads.get("Uploads", []))
        return found


def differences(expected: Fingerprint, found: Fingerprint) -> list[str]:
    """Names of what is not the same, with both sides where they are short."""
    out: list[str] = []
    for name in sorted({*expected, *found}):
        one, other = expected.get(name, "absent"), found.get(name, "absent")
        if not _same(one, other):
            out.append(f"{name}: {_short(other)}, undisturbed {_short(one)}")
    return out


def _same(one: object, other: object) -> bool:
    """Equal; points of a chart to the last digits, because a stop sums one of them in another order."""
    if not (isinstance(one, list) and isinstance(other, list)):
        return one == other
    return len(one) == len(other) and all(
        a[0] == b[0] and math.isclose(a[1], b[1], rel_tol=1e-12) for a, b in zip(one, other, strict=True)
    )


def _short(value: object) -> str:
    return json.dumps(value, default=str)[:80]
