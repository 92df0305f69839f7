"""Batches that wait for a store that is away, and go on at the step they were to bring."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch

from ddpm_pipeline.data.reading.loader import Batch, Loader, resilient_batches
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.retry import RetryPolicy
from ddpm_pipeline.store import StoreUnreachable


@dataclass
class Flaky:
    """A loader whose store is away when it shall bring certain steps, as often as is said there."""

    away: dict[int, int]
    error: type[Exception] = StoreUnreachable
    begun: list[int] = field(default_factory=list)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        self.begun.append(start)
        for step in range(start, stop):
            if self.away.get(step, 0) > 0:
                self.away[step] -= 1
                raise self.error("s3://b/x: away")
            yield Batch(step, torch.arange(2) + 2 * step, torch.zeros(2, 1, 8, 8), None, 0.25)


def fed(loader: Flaky, start: int, stop: int, seconds: float = 60.0) -> Iterator[Batch]:
    policy = RetryPolicy(None, 0.01, 0.01, seconds)
    return resilient_batches(cast(Loader, loader), start, stop, policy)


def test_after_an_outage_every_step_comes_once_and_in_order() -> None:
    loader = Flaky({3: 1, 6: 3})
    found = list(fed(loader, 2, 9))
    assert [batch.step for batch in found] == list(range(2, 9))
    assert loader.begun == [2, 3, 6, 6, 6]
    # the outage counts as waiting for data, and only for the step that waited
    waits = {batch.step: batch.wait_seconds for batch in found}
    assert waits[3] > 0.25
    assert waits[6] >= 0.25 + 3 * 0.005
    assert all(wait == 0.25 for step, wait in waits.items() if step not in (3, 6))


def test_a_store_that_stays_away_ends_the_wait_and_each_outage_has_a_time_of_its_own() -> None:
    with pytest.raises(StoreUnreachable, match="away"):
        list(fed(Flaky({3: 10_000}), 0, 5, seconds=0.05))
    flaky = Flaky(dict.fromkeys(range(30), 2))
    assert len(list(fed(flaky, 0, 30, seconds=0.2))) == 30  # in all longer than the time for one


def test_damage_is_not_waited_for() -> None:
    loader = Flaky({3: 1}, DamageError)
    with pytest.raises(DamageError):
        list(fed(loader, 0, 5))
    assert loader.begun == [0]
