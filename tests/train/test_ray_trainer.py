"""What the driver does when Ray cannot start a group of workers, and what it logs when training stalls."""

import logging
import threading

import pytest
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from pipeline.train import ray_trainer
from pipeline.train.ray_trainer import stall_reason
from pipeline.train.worker import WorkerGroupStartError
from tests.train.tiny import tiny


class Fits:
    """Trainers that end one after the other as they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ends: Exception | None) -> None:
        self._ends = list(ends)
        self.begun = 0
        self.threads: list[threading.Thread] = []
        monkeypatch.setattr(ray_trainer, "_trainer", self._trainer)

    def _trainer(self, *_: object) -> "Fits":
        return self

    def fit(self) -> None:
        self.begun += 1
        self.threads.append(threading.current_thread())
        end = self._ends.pop(0)
        if end is not None:
            raise end


def fit(stop: threading.Event | None = None) -> None:
    ray_trainer._fit(tiny("file:///nowhere", "file:///nowhere"), None, "", stop or threading.Event())  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("silence", "what"),
    [(1.0, "workers are alive"), (float("inf"), "no workers running"), (None, "does not respond")],
)
def test_a_stalled_training_logs_what_it_may_be_waiting_for(silence: float | None, what: str) -> None:
    line = stall_reason(61.0, 240, silence)
    assert "no progress for 61 s (last step 240)" in line
    assert what in line
    assert "\n" not in line
