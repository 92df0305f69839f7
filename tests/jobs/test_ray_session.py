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


def test_ray_refuses_another_last_number_of_pythons_version_unless_told_and_our_line_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray._private.utils import check_version_info, compute_version_info

    from ddpm_pipeline.jobs.ray_session import PATCH_VARIABLE, _remedy  # pyright: ignore[reportPrivateUsage]

    ours, python = compute_version_info()[:2]
    cluster = {"ray_version": ours, "python_version": f"{python.rpartition('.')[0]}.99"}
    monkeypatch.delenv(PATCH_VARIABLE, raising=False)
    with pytest.raises(RuntimeError) as refused:
        check_version_info(cluster, "node 10.0.0.7")
    assert f"set {PATCH_VARIABLE}=minor" in _remedy(str(refused.value))
    assert _remedy("no answer") == "is the cluster up?"
    monkeypatch.setenv(PATCH_VARIABLE, "minor")
    check_version_info(cluster, "node 10.0.0.7")
