"""A stream over ranges goes on where its connection ended."""

from ddpm_pipeline.retry import RetryPolicy
from ddpm_pipeline.store.stream import ResumingStream
from ddpm_pipeline.telemetry.counters import totals

DATA = bytes(range(100))


class _Cut:
    """A connection that gives a few bytes and ends."""

    def __init__(self, start: int) -> None:
        self.left = DATA[start : start + 30]

    def read(self, amt: int) -> bytes:
        given, self.left = self.left[:amt], self.left[amt:]
        return given

    def close(self) -> None:
        """Nothing is held."""


def test_every_connection_that_is_asked_for_again_counts_as_a_repeated_call() -> None:
    before = totals().get("store_retries", 0)
    policy = RetryPolicy(attempts=3, first_pause_seconds=0.0)
    stream = ResumingStream(
        lambda start: (_Cut(start), len(DATA)), policy, lambda error: True, lambda action: action()
    )
    assert stream.readall() == DATA
    assert totals()["store_retries"] - before == 3
