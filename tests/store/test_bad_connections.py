"""Reads against a server that cuts, refuses and swaps."""

import random
from collections.abc import Callable

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import ObjectChanged, RetryPolicy, StoreUnreachable, open_store
from ddpm_pipeline.store.s3_store import S3Store
from tests.store.hostile_s3 import Hostile, breaking_off, cut_at_random, serving

QUICK = RetryPolicy(attempts=5, first_pause_seconds=0.001, longest_pause_seconds=0.01)
DATA = random.Random(0).randbytes(300_000)


@pytest.fixture
def against(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], S3Store]:
    """A store at an address, with short pauses."""

    def connect(address: str) -> S3Store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
        return S3Store("bucket", policy=QUICK)

    return connect


def test_a_server_that_cuts_every_connection_is_read_to_the_end(against: Callable[[str], S3Store]) -> None:
    hostile = Hostile([DATA], cut=cut_at_random(1, 20_000))
    with serving(hostile) as address:
        assert against(address).read("x") == DATA
    # Far more cuts than the policy's attempts: progress renews the budget. Each request goes on where one broke off.
    assert len(hostile.requests) > 15
    starts = [int(span.removeprefix("bytes=").partition("-")[0]) for span in hostile.requests]
    assert starts == sorted(set(starts))


def test_a_range_is_resumed_inside_the_range(against: Callable[[str], S3Store]) -> None:
    hostile = Hostile([DATA], cut=cut_at_random(2, 5_000))
    with serving(hostile) as address:
        assert against(address).read_range("x", 1000, 50_000) == DATA[1000:51_000]
    assert all(span.endswith("-50999") for span in hostile.requests)


def test_bursts_of_slow_down_are_waited_out(against: Callable[[str], S3Store]) -> None:
    hostile = Hostile([DATA], cut=cut_at_random(3, 100_000), failures_first=QUICK.attempts - 2)
    with serving(hostile) as address:
        assert against(address).read("x") == DATA


def test_a_server_that_only_refuses_ends_the_read_within_the_budget(
    against: Callable[[str], S3Store],
) -> None:
    hostile = Hostile([DATA], failures_first=10**9)
    with serving(hostile) as address, pytest.raises(StoreUnreachable, match=r"s3://bucket/x: .*SlowDown"):
        against(address).read("x")
    assert len(hostile.requests) == QUICK.attempts


def test_a_server_that_sends_nothing_ends_the_read_within_the_budget(
    against: Callable[[str], S3Store],
) -> None:
    hostile = Hostile([DATA], cut=lambda size: 0)
    with serving(hostile) as address, pytest.raises(StoreUnreachable, match="does not answer"):
        against(address).read("x")
    assert len(hostile.requests) == QUICK.attempts


def test_an_object_swapped_in_the_middle_is_noticed_and_never_mixed(
    against: Callable[[str], S3Store],
) -> None:
    hostile = Hostile([DATA, DATA[::-1]], cut=lambda size: min(size, 10_000), swap_after=3)
    with (
        serving(hostile) as address,
        against(address).open("x") as stream,
        pytest.raises(ObjectChanged, match="s3://bucket/x: replaced"),
    ):
        stream.read()
    assert len(hostile.requests) == 4


def test_read_whole_an_object_swapped_in_the_middle_is_read_again(against: Callable[[str], S3Store]) -> None:
    hostile = Hostile([DATA, DATA[::-1]], cut=lambda size: min(size, 10_000), swap_after=3)
    with serving(hostile) as address:
        assert against(address).read("x") == DATA[::-1]
    assert len(hostile.requests) > 5


def test_an_endpoint_nobody_listens_at_is_said_at_once_and_without_the_keys(
    against: Callable[[str], S3Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Hostile([b""])) as address:
        port = address.rpartition(":")[2]
    against(f"http://user:password@127.0.0.1:{port}")
    with pytest.raises(
        StoreUnreachable, match=rf"s3://bucket: http://127.0.0.1:{port} does not answer"
    ) as caught:
        open_store("s3://bucket").require_container()
    assert not any(
        word in str(caught.value) for word in ("password", "secret-of-the-test", "key-of-the-test")
    )


@pytest.mark.timeout(30)
def test_a_write_is_tried_again_when_the_server_says_continue_and_no_more(
    against: Callable[[str], S3Store],
) -> None:
    with breaking_off(times=2) as (address, requests):
        against(address).write("x", DATA)
    assert len(requests) == 3
    assert not [head for head in requests if b"expect" in head.lower()]


def test_missing_keys_are_said_in_one_line(
    against: Callable[[str], S3Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = against("http://127.0.0.1:9")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="no S3 keys found; set AWS_ACCESS_KEY_ID"):
        store.require_container()
