"""Training in this process asks this machine's GPU, or compiler, before it begins."""

from collections.abc import Sequence

import pytest

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.devices.preflight import GpuNeeds, GpuReport
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.train import fit_cluster, fit_machine
from ddpm_pipeline.train.fit_machine import require_fit_machine
from tests.train.tiny import tiny


def config(compiled: bool = False, **workers: object) -> TrainConfig:
    return tiny("file:///data", "file:///runs", workers=workers, compile=compiled)


def test_a_gpu_that_is_not_asked_for_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GpuNeeds] = []
    monkeypatch.setattr(fit_machine, "check_gpus", asked.append)
    require_fit_machine(config())
    assert asked == []


def test_an_unfit_gpu_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [GpuReport(gpu="GPU 0", fault="no driver", remedy="install one")]
    asked: list[GpuNeeds] = []

    def check(needs: GpuNeeds) -> Sequence[GpuReport]:
        asked.append(needs)
        return reports

    monkeypatch.setattr(fit_machine, "check_gpus", check)
    with pytest.raises(
        UserError,
        match=r"^train\.workers\.gpus_per_worker: GPU 0 of this machine: no driver; [^\n]*set it to 0",
    ):
        require_fit_machine(config(compiled=True, gpus_per_worker=1))
    assert asked == [GpuNeeds(compiler=True)]  # one process needs no NCCL
    reports[:] = [GpuReport(gpu="GPU 0")]
    require_fit_machine(config(gpus_per_worker=1))


def test_compiling_for_the_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_machine, "compiler_fault", lambda language: (f"no {language}", "install it"))
    require_fit_machine(config())
    with pytest.raises(UserError, match=r"^train\.compile: no c\+\+; install it"):
        require_fit_machine(config(compiled=True))


@pytest.mark.parametrize(("num_workers", "nccl"), [(1, False), ((1, 4), True)])
def test_a_cluster_needs_nccl_where_several_workers_may_train(
    monkeypatch: pytest.MonkeyPatch, num_workers: object, nccl: bool
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(fit_cluster, "require_fit_workers", lambda workers, *_: asked.append(workers.nccl))
    fit_cluster.require_fit_cluster(config(num_workers=num_workers, gpus_per_worker=1), None)  # type: ignore[arg-type]
    assert asked == [nccl]
