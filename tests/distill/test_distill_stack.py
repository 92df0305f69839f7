"""Distillation on the real stack: worker and driver are killed, and the student and its samples are the same."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.distill_job import DistillConfig
from ddpm_pipeline.config.generation import GenerateConfig, GuardConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.distill.plan_distillation import plan_distillation
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.store import open_store
from ddpm_pipeline.tracking import resolve
from ddpm_pipeline.train.checkpoint import latest_checkpoint
from ddpm_pipeline.train.training_plan import TrainPlan, plan_training
from tests.commands import ddpm
from tests.driving import Driver, ray_workers
from tests.generate.tiny import contents
from tests.train.tiny import tiny

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(900)]

STEPS = 240
FEW = SamplerConfig(kind="consistency", num_steps=2)
PATIENCE_SECONDS = 240


def quietly(done: int, total: int, note: str = "") -> None:
    """No progress."""


def distill(data: str, runs: str, name: str) -> DistillConfig:
    settings: dict[str, object] = {
        "name": name,
        "runs": runs,
        "teacher": "taught-by/1",
        "sampler": {"kind": "ddim", "num_steps": 4, "guidance_scale": 1.5},
        "data": {"uri": data},
        "steps": STEPS,
        "global_batch": 14,
        "log_every_steps": 10,
        "checkpoint": {"every_steps": 20, "eval_samples": 10},
        "grid": {"every_steps": 240, "count": 10, "sampler": FEW},
        "workers": {"num_workers": 2},
        "track": {"experiment": "tests-distill", "send_interval_seconds": 0.2},
    }
    return DistillConfig.model_validate(settings)


def plan_of(config: DistillConfig) -> TrainPlan:
    return plan_training(plan_distillation(config, quietly))


def weights(plan: TrainPlan) -> dict[str, Tensor]:
    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None
    assert checkpoint.record.step == STEPS
    return checkpoint.tensors


def wait_for(what: Callable[[], bool], job: Driver) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert time.monotonic() < deadline, job.said[-3000:]
        assert job.process.poll() in (None, 0), job.said[-3000:]
        time.sleep(0.1)


def has_step(plan: TrainPlan, step: int) -> bool:
    found = latest_checkpoint(plan.store)
    return found is not None and found.record.step >= step


@pytest.fixture(scope="module")
def data(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits, and a teacher that is registered."""
    uri = "s3://ddpm/tests/distill-digits"
    pack(PackConfig(source="digits", dest=uri, channels=1, shard_size=300), None)
    teacher = tiny(uri, "s3://ddpm/tests/distill-teacher", name="taught-by", workers={"num_workers": 1})
    job = Driver("train", teacher, tmp_path_factory.mktemp("teacher"), command=["train", "--local"])
    assert job.process.wait(PATIENCE_SECONDS) == 0, job.said[-3000:]
    return uri


def test_a_distillation_whose_worker_and_driver_are_killed_ends_in_the_same_weights_and_its_samples_are_sound(
    data: str, stack: LocalStack, tmp_path: Path
) -> None:
    calm = distill(data, "s3://ddpm/tests/distill-calm", "calm-fast")
    job = Driver("distill", calm, tmp_path / "calm")
    assert job.process.wait(PATIENCE_SECONDS) == 0, job.said[-3000:]
    struck = distill(data, "s3://ddpm/tests/distill-struck", "struck-fast")
    plan = plan_of(struck)
    job = Driver("distill", struck, tmp_path / "struck")
    wait_for(lambda: has_step(plan, 40), job)
    ray_workers(stack, "RayTrainWorker")[0].kill()
    wait_for(lambda: has_step(plan, 120), job)
    job.end(signal.SIGKILL)
    job.again()
    assert job.process.wait(PATIENCE_SECONDS) == 0, job.said[-3000:]
    undisturbed, ended = weights(plan_of(calm)), weights(plan)
    for name, value in undisturbed.items():
        if name.startswith(("net/", "ema/")):
            assert torch.equal(value, ended[name]), name
    version = resolve("struck-fast@champion")
    fast = GenerateConfig(
        model=version.reference,
        output="s3://ddpm/tests/distill-samples",
        count=40,
        shard_size=10,
        batch_size=5,
        sampler=FEW,
        guards=GuardConfig(enabled=False),
        track=None,
    )
    job = Driver("generate", fast, tmp_path / "generate")
    wait_for(lambda: any(True for _ in open_store(fast.output).list("done/")), job)
    job.end(signal.SIGKILL)
    job.again()
    assert job.process.wait(PATIENCE_SECONDS) == 0, job.said[-3000:]
    assert verify(fast.output).ok
    whole = fast.model_copy(update={"output": "s3://ddpm/tests/distill-whole"})
    job = Driver("generate", whole, tmp_path / "whole")
    assert job.process.wait(PATIENCE_SECONDS) == 0, job.said[-3000:]
    assert contents(open_store(whole.output)) == contents(open_store(fast.output))
    assert ddpm("sample", f"model={version.reference}", "count=2", f"output={tmp_path}/few") == 2
