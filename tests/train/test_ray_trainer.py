"""What the driver does when Ray cannot start a group of workers, and what it logs when training stalls."""

# pyright: reportPrivateUsage=false

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from ddpm_pipeline.errors import JobError, UserError
from ddpm_pipeline.train import ray_trainer, train_coordinator
from ddpm_pipeline.train.rank_watch import RankMark
from ddpm_pipeline.train.ray_trainer import stall_reason
from ddpm_pipeline.train.train_task import WorkerGroupStartError
from tests.train.tiny import tiny


def _same(value: object) -> object:
    return value


class Fits:
    """Trainers that end one after the other as they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ends: Exception | int | None) -> None:
        self._ends = list(ends)
        self.begun = 0
        self.threads: list[threading.Thread] = []
        monkeypatch.setattr(ray_trainer, "_trainer", self._trainer)

    def _trainer(self, *_: object) -> "Fits":
        return self

    def fit(self) -> SimpleNamespace:
        self.begun += 1
        self.threads.append(threading.current_thread())
        end = self._ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return SimpleNamespace(return_value=end)


def fit(stop: threading.Event | None = None) -> None:
    task: Any = SimpleNamespace(config=tiny("file:///nowhere", "file:///nowhere", steps=24))
    coordinator = SimpleNamespace(drained=SimpleNamespace(remote=lambda: ("10.0.0.2",)))
    ray_trainer._fit(task, coordinator, "", stop or threading.Event())


NO_RESOURCES = ControllerError(WorkerGroupStartupTimeoutError(2))


def test_missing_resources_are_waited_for_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fits = Fits(monkeypatch, NO_RESOURCES, None)
    with caplog.at_level(logging.WARNING):
        fit()
    assert fits.begun == 2
    assert "no free resources for all workers; retrying" in caplog.text


def test_the_wait_for_resources_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_trainer, "MAX_STARTS", 3)
    fits = Fits(monkeypatch, NO_RESOURCES, NO_RESOURCES, NO_RESOURCES)
    with pytest.raises(ControllerError):
        fit()
    assert fits.begun == 3


def test_a_group_lost_before_it_trained_makes_the_job_start_over(monkeypatch: pytest.MonkeyPatch) -> None:
    Fits(monkeypatch, ControllerError(RuntimeError("a worker died\nwhile joining")))
    with pytest.raises(WorkerGroupStartError, match="a worker died while joining"):
        fit()


def test_ray_does_not_replace_the_signal_handlers_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray puts a handler of its own in place where it is called in the main thread
    fits = Fits(monkeypatch, None)
    fit()
    assert fits.threads != [threading.main_thread()]


def test_workers_lost_too_often_while_training_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = Fits(monkeypatch, WorkerGroupError("lost", {0: RuntimeError("lost")}))
    with pytest.raises(WorkerGroupError):
        fit()
    assert fits.begun == 1


@pytest.mark.parametrize("met", [NO_RESOURCES, ControllerError(RuntimeError("a worker died"))])
def test_a_request_to_stop_is_heeded_while_no_group_trains(
    monkeypatch: pytest.MonkeyPatch, met: ControllerError
) -> None:
    stop = threading.Event()
    stop.set()
    fits = Fits(monkeypatch, met)
    fit(stop)
    assert fits.begun == 1


@pytest.fixture
def on_node_n1(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process runs on a Ray node of that id."""
    context = SimpleNamespace(get_node_id=lambda: "n1")
    monkeypatch.setattr(ray_trainer.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray_trainer.ray, "get", _same)


@pytest.mark.usefixtures("on_node_n1")
def test_a_group_that_left_a_drained_node_is_followed_by_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_trainer, "MAX_STARTS", 2)
    monkeypatch.setattr(ray_trainer, "draining_nodes", lambda: ["n2"])
    fits = Fits(monkeypatch, NO_RESOURCES, 7, NO_RESOURCES, 9, 24)  # the bound holds for each group anew
    with caplog.at_level(logging.WARNING):
        fit()
    assert fits.begun == 5
    assert (
        "Ray drains node 10.0.0.2: the workers saved a checkpoint at step 7 and ended; others go on from there"
    ) in caplog.text


@pytest.mark.usefixtures("on_node_n1")
def test_a_job_whose_own_node_is_drained_ends_once_its_workers_have_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_trainer, "draining_nodes", lambda: ["n1"])
    fits = Fits(monkeypatch, 7)
    with pytest.raises(JobError, match=r"step 7 and ended, and this job runs there itself; run the same"):
        fit()
    assert fits.begun == 1


def test_a_group_is_asked_to_end_while_ray_drains_a_node_that_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draining = ["n9"]
    monkeypatch.setattr(train_coordinator, "draining_nodes", lambda: draining)
    actor: Any = train_coordinator.TrainCoordinator
    coordinator: Any = actor.__ray_metadata__.modified_class(train_coordinator.DriverNode("n0", "10.0.0.1"))
    coordinator.begin_group(2)
    coordinator.mark(RankMark(1, "10.0.0.2", 0, node_id="n2"))
    assert not coordinator.stop_requested()
    draining.append("n2")
    assert coordinator.stop_requested()
    assert coordinator.drained() == ("10.0.0.2",)
    coordinator.begin_group(2)
    coordinator.mark(RankMark(1, "10.0.0.3", 0, node_id="n3"))
    assert not coordinator.stop_requested()
    draining.append("n0")  # the driver's
    assert coordinator.stop_requested()


@pytest.mark.parametrize(
    ("silence", "what"),
    [(1.0, "workers are alive"), (float("inf"), "no workers running"), (None, "does not respond")],
)
def test_a_stalled_training_logs_what_it_may_be_waiting_for(silence: float | None, what: str) -> None:
    line = stall_reason(61.0, 240, silence)
    assert "no progress for 61 s (last step 240)" in line
    assert what in line
    assert "\n" not in line


def test_a_stalled_training_names_the_rank_that_the_others_wait_for() -> None:
    line = stall_reason(61.0, 240, 1.0, "the others wait for rank 1 (node n1), computing after step 240")
    assert line.endswith("(last step 240): the others wait for rank 1 (node n1), computing after step 240")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (AssertionError("Torch not compiled with CUDA enabled"), "install the CUDA build of torch"),
        (RuntimeError("backend='inductor' raised:\nRuntimeError: Failed to find C compiler."), "install gcc"),
    ],
)
def test_a_machine_that_is_not_set_up_for_the_work_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    fits = Fits(monkeypatch, ControllerError(error))
    with pytest.raises(UserError, match=f"^workers cannot train there: [^\n]*; {remedy}"):
        fit()
    assert fits.begun == 1


@pytest.mark.usefixtures("on_node_n1")
def test_an_unfit_worker_tells_the_driver_instead_of_asking_for_another_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Exception] = []
    coordinator: Any = SimpleNamespace(
        failure=SimpleNamespace(remote=lambda: None),
        fail=SimpleNamespace(remote=told.append),
        mark=SimpleNamespace(remote=_same),
    )
    context = SimpleNamespace(
        get_world_rank=lambda: 1, get_world_size=lambda: 2, get_node_rank=lambda: 0, get_local_rank=lambda: 1
    )

    def fail(*_: object) -> None:
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\nCompile with"
        )

    monkeypatch.setattr(ray_trainer.ray.util, "get_node_ip_address", lambda: "10.0.0.3")
    monkeypatch.setattr(ray_trainer.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray_trainer, "get_device", lambda: "cpu")
    monkeypatch.setattr(ray_trainer, "set_up_logging", lambda: None)
    monkeypatch.setattr(ray_trainer, "train_worker", fail)
    task = SimpleNamespace(config=tiny("file:///nowhere", "file:///nowhere"), finished_steps=0)
    with pytest.raises(RuntimeError, match="no kernel image"):
        ray_trainer._on_worker({"task": task, "coordinator": coordinator})
    (error,) = told
    assert isinstance(error, UserError)
    assert str(error).startswith("node 10.0.0.3: CUDA error: no kernel image is available")
    assert "install torch for this GPU's compute capability" in str(error)
