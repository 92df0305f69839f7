"""Joining a cluster once for all that happens within."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ddpm_pipeline.jobs import ray_session
from ddpm_pipeline.jobs.ray_session import ray_cluster


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would happen to the connection."""
    events: list[str] = []

    @contextmanager
    def connection() -> Iterator[None]:
        events.append("join")
        try:
            yield
        finally:
            events.append("leave")

    monkeypatch.setattr(ray_session, "_connection", connection)
    return events


def test_a_block_within_another_shares_its_connection(events: list[str]) -> None:
    with ray_cluster():
        with ray_cluster():
            assert events == ["join"]
        assert events == ["join"]
    assert events == ["join", "leave"]


def test_after_an_error_the_cluster_is_joined_anew(events: list[str]) -> None:
    with pytest.raises(ValueError, match="inside"), ray_cluster():
        raise ValueError("inside")
    with ray_cluster():
        pass
    assert events == ["join", "leave"] * 2
