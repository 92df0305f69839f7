"""Cleanup does not close a running job's run for good, whenever its heartbeat arrives."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace as Made
from typing import Any

import pytest

from ddpm_pipeline.tracking import cleanup, close_stale_runs
from ddpm_pipeline.tracking.run import (
    HEARTBEAT_TAG,
    KEY_TAG,
    OPENED_TAG,
    REASON_TAG,
    STALE_TAG,
    reopen_if_closed_as_stale,
)

RUN = "0123456789abcdef0123456789abcdef"


@dataclass
class Registry:
    """One run on a server; `meanwhile` happens before the call of that name and number."""

    tags: dict[str, str] = field(
        default_factory=lambda: {KEY_TAG: "train/x", HEARTBEAT_TAG: "1000.0", OPENED_TAG: "first"}
    )
    status: str = "RUNNING"
    meanwhile: dict[str, Callable[[], None]] = field(default_factory=dict[str, Callable[[], None]])
    called: list[str] = field(default_factory=list[str])

    def _call(self, name: str) -> None:
        self.called.append(name)
        self.meanwhile.get(f"{name} {self.called.count(name)}", lambda: None)()

    def _run(self) -> Any:
        info = Made(run_id=RUN, run_name="x", start_time=1_000_000, status=self.status)
        return Made(info=info, data=Made(tags=dict(self.tags)))

    def search_experiments(self, **_: object) -> list[Any]:
        return [Made(experiment_id="0")]

    def search_runs(self, *_: object, **__: object) -> Any:
        class Page(list[Any]):
            token = None

        return Page([self._run()] if self.status == "RUNNING" else [])

    def get_run(self, run_id: str) -> Any:
        self._call("get_run")
        return self._run()

    def set_tag(self, run_id: str, name: str, value: str) -> None:
        self._call("set_tag")
        self.tags[name] = value

    def delete_tag(self, run_id: str, name: str) -> None:
        del self.tags[name]

    def set_terminated(self, run_id: str, status: str) -> None:
        self._call("set_terminated")
        self.status = status

    def update_run(self, run_id: str, status: str) -> None:
        self.status = status

    def beat(self) -> None:
        """As a living run's spool does it (Sender.send_heartbeat)."""
        self.tags[HEARTBEAT_TAG] = "5000.0"
        reopen_if_closed_as_stale(self, RUN)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry()
    monkeypatch.setattr(cleanup, "require_server", lambda uri: "")
    monkeypatch.setattr(cleanup, "tracking_client", lambda address: made)
    return made


def clean() -> int:
    return len(close_stale_runs(idle_minutes=30, now_seconds=1000 + 3600))


def test_a_silent_run_is_closed_with_its_reason(server: Registry) -> None:
    assert clean() == 1
    assert server.status == "KILLED"
    assert "60 minutes" in server.tags[REASON_TAG]
    assert clean() == 0


@pytest.mark.parametrize("moment", ["get_run 1", "set_tag 1", "set_tag 2", "set_terminated 1", "get_run 2"])
def test_a_sign_of_life_during_cleanup_leaves_the_run_open(server: Registry, moment: str) -> None:
    server.meanwhile[moment] = server.beat
    assert clean() == 0
    assert server.status == "RUNNING"
    assert not {REASON_TAG, STALE_TAG} & server.tags.keys()


def test_a_sign_of_life_after_cleanup_opens_the_run_again(server: Registry) -> None:
    assert clean() == 1
    server.beat()
    assert server.status == "RUNNING"
    assert not {REASON_TAG, STALE_TAG} & server.tags.keys()


def test_a_clock_that_is_behind_closes_nothing_and_is_named(
    server: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    assert close_stale_runs(idle_minutes=0, now_seconds=1000 - 3600) == []
    assert server.status == "RUNNING"
    assert (
        "stays open: its last activity is 60 minutes in the future; compare this machine's clock"
        in caplog.text
    )


def test_a_run_that_a_new_driver_opened_meanwhile_is_left_alone(server: Registry) -> None:
    server.meanwhile["get_run 1"] = lambda: server.tags.update({OPENED_TAG: "second"})
    assert clean() == 0
    assert server.status == "RUNNING"


def test_a_run_that_ended_meanwhile_keeps_its_end(server: Registry) -> None:
    server.meanwhile["get_run 1"] = lambda: setattr(server, "status", "FINISHED")
    assert clean() == 0
    assert server.status == "FINISHED"


def test_a_sign_of_life_opens_no_run_that_ended_by_itself(server: Registry) -> None:
    server.status = "FINISHED"
    server.beat()
    assert server.status == "FINISHED"
