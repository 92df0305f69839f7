"""What the driver does when Ray cannot bring a group of workers to train, and what it says when nothing happens."""

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


NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(2))


def test_where_there_is_no_room_it_looks_again_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fits = Fits(monkeypatch, NO_ROOM, None)
    with caplog.at_level(logging.WARNING):
        fit()
    assert fits.begun == 2
    assert "no room for all workers; looking again" in caplog.text


def test_it_does_not_look_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_trainer, "MOST_STARTS", 3)
    fits = Fits(monkeypatch, NO_ROOM, NO_ROOM, NO_ROOM)
    with pytest.raises(ControllerError):
        fit()
    assert fits.begun == 3


def test_a_group_lost_before_it_trained_is_left_to_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    Fits(monkeypatch, ControllerError(RuntimeError("a worker died\nwhile joining")))
    with pytest.raises(WorkerGroupStartError, match="a worker died while joining"):
        fit()


def test_the_signals_stay_the_jobs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray puts a handler of its own in place where it is called in the main thread
    fits = Fits(monkeypatch, None)
    fit()
    assert fits.threads != [threading.main_thread()]


def test_workers_that_trained_and_were_lost_too_often_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = Fits(monkeypatch, WorkerGroupError("lost", {0: RuntimeError("lost")}))
    with pytest.raises(WorkerGroupError):
        fit()
    assert fits.begun == 1


@pytest.mark.parametrize("met", [NO_ROOM, ControllerError(RuntimeError("a worker died"))])
def test_whoever_is_asked_to_stop_while_no_group_trains_stops(
    monkeypatch: pytest.MonkeyPatch, met: ControllerError
) -> None:
    stop = threading.Event()
    stop.set()
    fits = Fits(monkeypatch, met)
    fit(stop)
    assert fits.begun == 1


@pytest.mark.parametrize(
    ("silence", "what"), [(1.0, "workers live"), (float("inf"), "no workers"), (None, "does not answer")]
)
def test_a_training_without_news_says_what_it_may_wait_for(silence: float | None, what: str) -> None:
    said = stall_reason(61.0, 240, silence)
    assert "no news for 61 s, after step 240" in said
    assert what in said
    assert "\n" not in said
